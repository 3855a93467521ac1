"""Hostile text, and what a page holds as a parser of HTML sees it."""

import html.parser

HOSTILE = (
    "</script><script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    '"><svg onload=document.title="owned">',
    "<!--<script>",
    "]]><a href=\"javascript:document.title='owned'\">x</a>",
    "{{ 7 * 7 }} {% raw %}",
    "</style><style>*{display:none}</style>",
    "<iframe src=https://example.invalid></iframe><meta http-equiv=refresh content=0>",
    "safe\u202eesrever\u2066\u200b\ufeff",
    "nul\x00bell\x07",
)
"""Text that tries to become markup, script, template or another direction."""
HALF = "half \ud800 of a pair"
"""No record of a run may hold it; a title and a completion may."""


class Outline(html.parser.HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: dict[str, int] = {}
        self.attributes: set[str] = set()
        self.links: list[str] = []
        self.said: list[str] = []
        self.inside: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.attributes |= {name for name, _ in attrs}
        self.links += [
            value
            for name, value in attrs
            if name in ("href", "src", "action", "data", "xlink:href") and value
        ]
        self.inside.append(tag)

    def handle_endtag(self, tag):
        if tag in self.inside:
            while self.inside.pop() != tag:
                pass

    def handle_data(self, data):
        if not {"script", "style"} & set(self.inside):
            self.said.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.said).split())
