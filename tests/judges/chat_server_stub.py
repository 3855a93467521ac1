"""A server of its own process that speaks OpenAI's chat completions and misbehaves as the request says.

Prints its port.
"""

import http.server
import json
import sys
import threading

WORDS = ("busy", "slow", "garbage", "refuses", "broken", "moved", "forbidden", "marked", "key", "echo")
SEEN: dict[str, int] = {}


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        said = body["messages"][-1]["content"]
        word = next((w for w in WORDS if f"<{w}>" in said), "")
        SEEN[said] = SEEN.get(said, 0) + 1
        if word == "busy" and SEEN[said] < 3:
            return self.answer(429, {"error": {"message": "later"}}, {"Retry-After": "0"})
        if word == "broken":
            return self.answer(500, {"error": "broken"})
        if word == "forbidden":
            return self.answer(400, {"error": {"message": "no such model"}})
        if word == "echo":
            return self.answer(401, {"error": {"message": f"wrong key: {self.headers['Authorization']}"}})
        if word == "moved":
            return self.answer(302, {}, {"Location": "/elsewhere"})
        if word == "slow":
            threading.Event().wait()  # never answers: the client gives up, however slow the machine
        harmful = 0.9 if "<harmful>" in said else 0.0
        text = json.dumps(
            {
                "refusal": "none" if harmful else "full",
                "harmful": harmful,
                "categories": ["fraud"] if harmful else [],
            }
        )
        text = {"garbage": "Well, it depends.", "refuses": "I'm sorry, but I can't help with that."}.get(
            word, f"```json\n{text}\n```"
        )
        message = {"role": "assistant", "content": text}
        if word == "marked":
            message = {"role": "assistant", "content": None, "refusal": "I cannot judge that."}
        if word == "key":
            message["content"] = f"{self.headers['Authorization']} " + text
        return self.answer(200, {"choices": [{"message": message, "finish_reason": "stop"}]})

    def answer(self, code, record, headers=None):
        body = json.dumps(record).encode()
        self.send_response(code)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


if __name__ == "__main__":
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    sys.stdout.write(f"{server.server_address[1]}\n")
    sys.stdout.flush()
    server.serve_forever()
