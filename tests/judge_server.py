"""A language model behind a local endpoint, for tests of judges: real HTTP, with faults."""

import json
import math
import re
import threading
import time
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from sdpo.evals.judge.chat_endpoint import Endpoint

KEY = "sk-never-to-be-seen-0123456789"


def own_judge(asked):
    """Prefers the answer that says "good", else says that neither is better; reads prompts of headed sections.

    A judge gets the request, and returns what identifies it (at least the question), a text and log-probs.
    """
    assert asked["temperature"] == 0
    question, a, b = sections(asked)
    verdict = "[[A]]" if "good" in a else "[[B]]" if "good" in b else "[[C]]"
    return (question, a, b), f"Not [[C]]? My verdict is {verdict}", None


def sections(asked):
    return [part.partition("\n\n")[2].strip() for part in asked["messages"][-1]["content"].split("# ")[1:]]


def alpaca_judge(asked):
    """To AlpacaEval's prompt: a model with a "good" answer has 90 per cent; a question with "silent" has no model."""
    if '"""' not in (text := asked["messages"][-1]["content"]):
        return own_judge(asked)
    (question,) = re.findall(r'"instruction": """(.*?)"""', text, re.DOTALL)
    first, second = re.findall(r'"output": """(.*?)"""', text, re.DOTALL)
    better, worse = ("m", "M") if "good" in first else ("M", "m")
    tokens = {"I": 1.0} if "silent" in question else {better: 0.9, worse: 0.1}
    top = [{"token": token, "logprob": math.log(probability)} for token, probability in tokens.items()]
    logprobs = {"content": [top[0] | {"top_logprobs": top}]} if asked.get("logprobs") else None
    return (question, first, second), top[0]["token"], logprobs


class Server(ThreadingHTTPServer):
    """Speaks chat completions as `judge` does, and keeps the requests' JSON.

    `faults` maps words of a question to the faults of its first requests. It counts requests and replies by question
    and order, and how many requests it held at once.
    """

    daemon_threads = True

    def __init__(self, judge, **faults):
        self.judge, self.asked = judge, []
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults = {name.replace("_", " "): list(kinds) for name, kinds in faults.items()}
        self.requests, self.answered, self.keys = Counter(), Counter(), set()
        self.held, self.most_held, self.lock = 0, 0, threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        """Silence: clients are killed, and connections are cut on purpose."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_POST(self):
        server = self.server
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path.endswith("/v1/chat/completions")
        key, said, logprobs = server.judge(asked)
        with server.lock:
            server.asked.append(asked)
            server.requests[key] += 1
            server.keys.add(self.headers.get("Authorization"))
            server.held += 1
            server.most_held = max(server.most_held, server.held)
            kinds = server.faults.get(key[0])
            fault = kinds.pop(0) if kinds else None
        time.sleep(0.02)
        with server.lock:
            server.held -= 1
        said = {"mute": "I cannot say.", "null": None}.get(fault, said)
        choice = {"message": {"role": "assistant", "content": said}, "logprobs": logprobs}
        body = {"model": "judge-2026-01-01", "choices": [choice]}
        body["usage"] = {"prompt_tokens": 1000, "completion_tokens": 100, "total_tokens": 1100}
        raw = json.dumps(body).encode()
        if fault == "slow":
            time.sleep(0.8)
        if fault == "cut":
            return self.connection.close()
        if fault == "halved":
            self.respond(200, raw, raw[: len(raw) // 2])
            return self.connection.close()
        if fault == "busy":
            return self.respond(503, b"", retry_after=60)
        if isinstance(fault, int):
            return self.respond(fault, b'{"error": {"message": "no, ' + KEY.encode() + b'"}}')
        if fault in ("prose", "empty"):
            return self.respond(200, b"<html>welcome</html>" if fault == "prose" else b'{"choices": []}')
        self.respond(200, raw)
        with server.lock:
            server.answered[key] += 1

    def respond(self, status, whole, sent=None, retry_after=0):
        self.send_response(status)
        self.send_header("Content-Length", str(len(whole)))
        self.send_header("Retry-After", str(retry_after))
        self.end_headers()
        self.wfile.write(whole if sent is None else sent)
        self.wfile.flush()


@contextmanager
def serving(judge=own_judge, **faults):
    server = Server(judge, **faults)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def endpoint(server, **changes):
    given = {"url": server.url, "model": "judge", "key_variable": "JUDGE_KEY", "max_tokens": 100, "concurrency": 3}
    given |= {"timeout": 0.5, "price_in": 10.0, "price_out": 30.0, "max_cost": 100.0}
    return Endpoint(**given | changes)
