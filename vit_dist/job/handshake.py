"""The handshake of two processes of a job: nothing that one says is believed before it has proved to know the secret.

Process 0 sends a random challenge to whoever connects. The other answers with its message, in which there is a
challenge of its own, and the message's code: an HMAC of the message and of the challenge under the job's secret. The
answer of process 0 has a code too, of both challenges. A recorded handshake is of no use, for no challenge comes twice.
What follows on the connection is neither signed nor encrypted.
"""

import hashlib
import hmac
import json
import secrets
from typing import Any

LONGEST = 4096  # bytes of a message


def new_challenge() -> str:
    """Returns a random text that no other connection has."""
    return secrets.token_hex(16)


def challenged(challenge: str) -> bytes:
    """Returns the line that process 0 begins with."""
    return json.dumps({"challenge": challenge}).encode() + b"\n"


def signed(secret: bytes, challenges: str, message: dict[str, Any]) -> bytes:
    """Returns a message as it is sent, a line, with its code.

    Args:
      secret: that of the job.
      challenges: of this connection, of process 0 first; those that the sender has received.
      message: anything that JSON can hold.
    """
    text = json.dumps(message)
    return json.dumps({"text": text, "code": _code(secret, challenges, text)}).encode() + b"\n"


def opened(secret: bytes, challenges: str, line: bytes) -> dict[str, Any] | None:
    """Returns the message of a line; None if the line is anything but one that `signed` makes with the same secret."""
    outer = parsed(line)
    text, code = (outer or {}).get("text"), (outer or {}).get("code")
    if not isinstance(text, str) or not isinstance(code, str):
        return None
    expected = _code(secret, challenges, text)
    return parsed(text) if hmac.compare_digest(expected.encode(), code.encode("utf-8", "replace")) else None


def parsed(text: bytes | str) -> dict[str, Any] | None:
    """Returns the object that a text of JSON is; None for any other text."""
    try:
        message = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return message if isinstance(message, dict) else None


def _code(secret: bytes, challenges: str, text: str) -> str:
    # The length keeps a challenge and a message from being read as another pair.
    data = f"{len(challenges)} {challenges} {text}".encode("utf-8", "surrogatepass")
    return hmac.new(secret, data, hashlib.sha256).hexdigest()
