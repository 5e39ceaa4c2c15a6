"""Replies of a model behind an endpoint that speaks OpenAI's chat completions.

Requests are retried with back-off, a few run at a time, and spending has a bound. Every reply is on the disk before its
question counts as answered, so that nothing is asked twice, also after a kill. The key is read from the environment
when a request is sent, and written nowhere. A request that is never answered counts as free.
"""

import fcntl
import hashlib
import json
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self
from urllib.request import getproxies, proxy_bypass

import urllib3
from urllib3.exceptions import ConnectTimeoutError, HTTPError, NewConnectionError

from sdpo.console import Progress, tell
from sdpo.errors import UserError, one_line
from sdpo.store.artifacts import Store

Conversation = list[dict[str, str]]

BUSY = (408, 429, 500, 502, 503, 504)  # statuses after which the same request may succeed
RETRIES = 8  # with pauses of 0, 1, 2, 4, ... 60 seconds and up to one second more, or as long as the endpoint says
BYTES_PER_TOKEN = 3.5  # of English text; for the estimate before a request
NONSENSE_RETRIES = 3


class Endpoint(NamedTuple):
    url: str  # up to and without /chat/completions
    model: str
    key_variable: str  # the environment variable that holds the key
    max_tokens: int  # of a reply
    concurrency: int
    timeout: float  # seconds of silence
    price_in: float  # dollars per million tokens
    price_out: float
    max_cost: float  # dollars that may ever be spent on this model, by all runs that share the store
    temperature: float = 0.0
    top_logprobs: int | None = None  # tokens whose log-probs are asked for at each position of the reply; None: no such

    @classmethod
    def of(cls, model_name: str, **settings: Any) -> Self:
        """The endpoint that settings of the configuration describe."""
        return cls(model=model_name, **settings)

    def cost(self, tokens_in: float, tokens_out: float) -> float:
        """The price in dollars."""
        return (tokens_in * self.price_in + tokens_out * self.price_out) / 1e6

    def estimate(self, conversation: Conversation) -> float:
        """About the largest price of a reply, in dollars."""
        num_bytes = sum(len(turn["content"].encode()) for turn in conversation)
        return self.cost(num_bytes / BYTES_PER_TOKEN, self.max_tokens)


class Reply(NamedTuple):
    text: str
    version: str  # the model that answered, as the endpoint names it
    logprobs: dict[str, Any] | None  # of the reply's tokens, if they are asked for


def digest(content: Any) -> str:
    """A short hash of JSON, without NUMERICS_VERSION, so that new versions of this code find replies that were paid."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def ask(endpoint: Endpoint, conversations: list[Conversation], about: dict[str, Any], store: Store) -> list[Reply]:
    """The replies to all conversations; those that the store has are not asked for again.

    `about` is kept beside every reply. Raises UserError if the endpoint refuses, cannot be reached or does not answer
    in its protocol, and before the bound on spending would be exceeded.
    """
    keys = [digest(_request(endpoint, turns)) for turns in conversations]
    path = store.root / "replies" / f"{digest({'url': endpoint.url, 'model': endpoint.model})}.jsonl"
    with Ledger(path, endpoint.max_cost, about) as ledger:
        missing = {key: turns for key, turns in zip(keys, conversations, strict=True) if key not in ledger.lines}
        if missing:
            price = sum(map(endpoint.estimate, missing.values()))
            tell(
                f"{endpoint.model}: {len(missing)} replies of {len(keys)} are asked for, about ${price:.4g} or less; "
                f"${ledger.spent:.4g} of ${endpoint.max_cost:.4g} is spent"
            )
            _ask_for(missing, endpoint, ledger)
        lines = [ledger.lines[key] for key in keys]
        return [Reply(line["text"], line["version"], line.get("logprobs")) for line in lines]


def _ask_for(missing: dict[str, Conversation], endpoint: Endpoint, ledger: "Ledger") -> None:
    """Add the replies to the ledger. After an error nothing more is asked, and what is under way is still kept."""
    ending = threading.Event()
    with (
        _connections(endpoint, ending) as pool,
        ThreadPoolExecutor(endpoint.concurrency) as workers,
        Progress(len(missing), "judge", "replies") as bar,
    ):
        _refuse_unreachable(endpoint, pool)
        asked = [
            workers.submit(ledger.add, key, endpoint.estimate(turns), partial(_reply, endpoint, turns, pool))
            for key, turns in missing.items()
        ]
        try:
            for future in as_completed(asked):
                future.result()
                bar.advance(1)
        except BaseException:
            ending.set()
            workers.shutdown(cancel_futures=True)
            raise


class _Retry(urllib3.Retry):
    """Repeats of a request, whose pauses end with an error when `ending` is set."""

    def __init__(self, *settings: Any, ending: threading.Event, **named: Any):
        super().__init__(*settings, **named)
        self._ending = ending

    def new(self, **changed: Any) -> Self:
        return super().new(ending=self._ending, **changed)

    def sleep(self, response: urllib3.BaseHTTPResponse | None = None) -> None:
        pause = (response and self.get_retry_after(response)) or self.get_backoff_time()
        if self._ending.wait(pause):
            raise HTTPError("asking has ended; the request is not repeated")


def _connections(endpoint: Endpoint, ending: threading.Event) -> urllib3.PoolManager:
    """Connections that repeat requests until `ending`, through the proxy that the environment names, if any."""
    retries = _Retry(
        RETRIES,
        ending=ending,
        status_forcelist=BUSY,
        allowed_methods=None,
        backoff_factor=0.5,
        backoff_max=60,
        backoff_jitter=1.0,
        raise_on_status=False,
        redirect=0,
    )
    options: dict[str, Any] = {"maxsize": endpoint.concurrency, "retries": retries, "timeout": endpoint.timeout}
    url = urllib3.util.parse_url(endpoint.url)
    proxy = None if proxy_bypass(url.host or "") else getproxies().get(url.scheme or "")
    return urllib3.ProxyManager(proxy, **options) if proxy else urllib3.PoolManager(**options)


def _refuse_unreachable(endpoint: Endpoint, pool: urllib3.PoolManager) -> None:
    """Raise UserError if the endpoint cannot be reached; any HTTP status will do. Retries would delay it by minutes."""
    try:
        pool.request("GET", f"{endpoint.url.rstrip('/')}/models", retries=False)
    except HTTPError as error:
        raise _unreachable(endpoint, error) from None


def _unreachable(endpoint: Endpoint, error: HTTPError) -> UserError:
    reason = one_line(getattr(error, "reason", None) or error)
    return UserError(f"{endpoint.url} cannot be reached ({reason}); start again to ask for what is missing")


class Ledger:
    """What was asked of one model of an endpoint: one JSON object a line, with what it cost.

    As a context manager it keeps other processes waiting, so that they know what is spent.
    """

    def __init__(self, path: Path, max_cost: float, about: dict[str, Any]):
        self._path, self._max_cost, self._about = path, max_cost, about
        self._reserved = 0.0  # dollars that the requests under way may cost
        self._lock = threading.Lock()  # of the threads of this process

    def __enter__(self) -> Self:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("a+b")
        fcntl.flock(self._file, fcntl.LOCK_EX)
        self._file.seek(0)
        whole = self._file.read()
        complete = whole[: whole.rfind(b"\n") + 1]  # a kill may have cut off the last line
        self._file.truncate(len(complete))
        lines = [json.loads(line) for line in complete.splitlines()]
        self.lines = {line["key"]: line for line in lines}
        self.spent: float = sum(line["cost"] for line in lines)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, key: str, estimate: float, ask: Callable[[], dict[str, Any]]) -> None:
        """Ask, and write the reply. Raises UserError instead if it might cost more than is left."""
        with self._lock:
            estimate = max([estimate, *(line["cost"] for line in self.lines.values())])  # tokens may be shorter here
            if self.spent + self._reserved + estimate > self._max_cost:
                raise UserError(
                    f"${self.spent:.4g} is spent, and one more reply may exceed max_cost={self._max_cost}: raise it "
                    "and start again; replies that are here are not asked for again"
                )
            self._reserved += estimate
        try:
            line = {"key": key} | self._about | ask()
        except BaseException:
            with self._lock:
                self._reserved -= estimate
            raise
        with self._lock:
            self._reserved -= estimate
            self._write(key, line)

    def _write(self, key: str, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.lines[key] = line
        self.spent += line["cost"]


def _request(endpoint: Endpoint, turns: Conversation) -> dict[str, Any]:
    asked = {"model": endpoint.model, "messages": turns, "temperature": endpoint.temperature}
    asked["max_tokens"] = endpoint.max_tokens
    return asked | ({"logprobs": True, "top_logprobs": endpoint.top_logprobs} if endpoint.top_logprobs else {})


def _reply(endpoint: Endpoint, turns: Conversation, pool: urllib3.PoolManager) -> dict[str, Any]:
    """A reply with its version and cost. A request without a usable reply may be billed: it adds its estimate."""
    lost = 0
    for _ in range(NONSENSE_RETRIES):
        response = _post(endpoint, turns, pool)
        lost += sum(_was_sent(entry.error) for entry in response.retries.history) if response.retries else 0
        try:
            content = response.json()
            choice, used = content["choices"][0], content.get("usage")
            text, logprobs = choice["message"]["content"], choice.get("logprobs")
            if text is None:  # a refusal, or the tokens were spent on reasoning: a reply without a verdict
                text = ""
            if not isinstance(text, str):
                raise TypeError(f"content is {type(text).__name__}")
            cost = endpoint.cost(used["prompt_tokens"], used["completion_tokens"]) if used else endpoint.estimate(turns)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            lost, problem = lost + 1, error
            continue
        version = "/".join(filter(None, (content.get("model") or endpoint.model, content.get("system_fingerprint"))))
        line = {"text": text, "version": version, "cost": cost + lost * endpoint.estimate(turns)}
        return line | ({"logprobs": _checked(logprobs, endpoint)} if endpoint.top_logprobs else {})
    raise UserError(
        f"{endpoint.url} does not answer as chat completions do ({one_line(problem)}): check the url"
    ) from problem


def _checked(logprobs: Any, endpoint: Endpoint) -> Any:
    tokens = logprobs.get("content") if isinstance(logprobs, dict) else None
    if not tokens or not all(token.get("top_logprobs") for token in tokens):
        raise UserError(
            f"{endpoint.url} gives no log-probs of {endpoint.model}'s tokens, which the protocol reads: use an "
            "endpoint that does, or a protocol that reads text, such as alpaca_eval:alpaca_eval_gpt4"
        )
    return logprobs


def _post(endpoint: Endpoint, turns: Conversation, pool: urllib3.PoolManager) -> urllib3.BaseHTTPResponse:
    key = os.environ.get(endpoint.key_variable)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        response = pool.request(
            "POST", f"{endpoint.url.rstrip('/')}/chat/completions", json=_request(endpoint, turns), headers=headers
        )
    except HTTPError as error:
        raise _unreachable(endpoint, error) from None
    if response.status != 200:
        said = response.data.decode(errors="replace")
        said = " ".join((said.replace(key, "***") if key else said).split())[:200]
        raise UserError(
            f"{endpoint.url} answers {response.status} to {endpoint.model} with the key in {endpoint.key_variable} "
            f"({said}); start again to ask for what is missing"
        )
    return response


def _was_sent(error: Exception | None) -> bool:
    return error is not None and not isinstance(error, NewConnectionError | ConnectTimeoutError)
