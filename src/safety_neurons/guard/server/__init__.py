"""The guard as a service. Needs the extra `serve`: fastapi, uvicorn, httpx and prometheus-client are imported
here only.
"""

from safety_neurons.guard.server.app import Service, serve_guard
from safety_neurons.guard.server.door import Limits, Settings
from safety_neurons.guard.server.engine import Engine
from safety_neurons.guard.server.shapes import Problem

__all__ = ["Engine", "Limits", "Problem", "Service", "Settings", "serve_guard"]
