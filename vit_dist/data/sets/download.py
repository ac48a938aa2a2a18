"""Downloads two public sets of IDX files, MNIST and Fashion-MNIST, and checks each file's MD5 digest.

A file gets its name only when it is complete and its digest is right. An interrupted download, or several processes
that download into one shared folder, therefore leave no half-written file.
"""

import dataclasses
import hashlib
import http.client
import logging
import urllib.request
from pathlib import Path

from vit_dist.config import ConfigError
from vit_dist.data.files import replacing

_log = logging.getLogger(__name__)
_TIMEOUT_S = 60


@dataclasses.dataclass(frozen=True)
class KnownSet:
    """A set that can be downloaded."""

    base: str  # URL of the folder that holds the files
    md5: dict[str, str]  # file name -> digest of the compressed file
    class_names: tuple[str, ...]


MNIST = KnownSet(
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    {
        "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
        "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
        "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
    },
    tuple("0123456789"),
)
FASHION_MNIST = KnownSet(
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    {
        "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
        "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
        "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
    },
    ("t-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"),
)


KNOWN = {"mnist": MNIST, "fashion_mnist": FASHION_MNIST}  # by `data.name`


def fetch(known: KnownSet, name: str, folder: Path) -> None:
    """Downloads the file `name` of a known set into `folder`.

    Raises `ConfigError` if the server does not answer or the content has another digest.
    """
    url = known.base + name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as response, replacing(folder / name) as file:
            content = response.read()
            digest = hashlib.md5(content, usedforsecurity=False).hexdigest()
            if digest != known.md5[name]:
                raise ConfigError(f"{url}: its md5 is {digest}, expected {known.md5[name]}; nothing was kept")
            file.write(content)
    except (OSError, http.client.HTTPException) as error:
        raise ConfigError(f"data.download: cannot fetch {url} into {folder}: {error}") from error
    _log.info("fetched %s", folder / name)
