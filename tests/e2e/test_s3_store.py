"""The verbs of storage on a real S3 server: what they promise, and what they say when the server refuses."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from rgw import Gateway

from dltrain.errors import StoreError
from dltrain.store import Store, filesystem, open_store

NAMES = (f"store-{number}" for number in itertools.count())
VARIABLES = (
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"),
    *("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"),
    *("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"),
)


@pytest.fixture(autouse=True)
def _environment(s3: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    for variable, value in s3.env.items():
        monkeypatch.setenv(variable, value)


@pytest.fixture
def bucket(s3: Gateway) -> str:
    return s3.make_bucket(next(NAMES))


@pytest.fixture
def store(bucket: str) -> Iterator[Store]:
    return open_store(f"{bucket}/runs/").child("one")


def test_url_is_normalised(store: Store, bucket: str) -> None:
    assert store.url == f"{bucket}/runs/one"
    assert store.path("a", "b") == f"{store.root}/a/b"


def test_write_and_read(store: Store) -> None:
    store.write("a/b", b"0123456789")
    assert store.read("a/b") == b"0123456789"
    assert store.size("a/b") == 10
    assert store.exists("a/b")
    assert store.exists("a")
    store.write("a/b", b"new")
    assert store.read("a/b") == b"new"
    assert store.size("a/b") == 3


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (0, 4, b"0123"),
        (4, None, b"456789"),
        (None, 3, b"012"),
        (8, 20, b"89"),
        (10, 12, b""),
        (20, 30, b""),
        (3, 3, b""),
    ],
)
def test_ranges_are_those_of_a_local_file(
    store: Store, tmp_path: object, start: int | None, end: int | None, expected: bytes
) -> None:
    for each in (store, open_store(str(tmp_path))):
        each.write("file", b"0123456789")
        assert each.read("file", start, end) == expected


def test_missing_file(store: Store) -> None:
    assert not store.exists("none")
    for verb in (store.read, store.size, lambda name: store.read(name, 0, 5)):
        with pytest.raises(FileNotFoundError):
            verb("none")
    assert store.list() == []
    assert store.list("none") == []
    assert store.dirs() == []
    store.delete("none")


def test_large_object_is_written_whole(store: Store) -> None:
    data = bytes(range(256)) * (110 * 2**20 // 256)
    store.write("large", data)
    assert store.size("large") == len(data)
    assert store.read("large") == data
    assert store.read("large", 100 * 2**20, 100 * 2**20 + 256) == bytes(range(256))
    assert store.create("large", b"") is False


def test_list_and_dirs_see_what_others_did(store: Store) -> None:
    other = open_store(store.url)
    assert store.list() == []
    for name in ("b/2", "b/1", "a", "bc/3", "b/deep/er/4"):
        other.write(name, b"x")
    assert store.list() == ["a", "b/1", "b/2", "b/deep/er/4", "bc/3"]
    assert store.list("b") == ["b/1", "b/2", "b/deep/er/4"]
    assert store.list("a") == []
    assert store.dirs() == ["b", "bc"]
    assert store.dirs("b") == ["deep"]
    assert store.dirs("a") == []
    other.delete("b")
    assert store.list() == ["a", "bc/3"]
    assert store.dirs() == ["bc"]
    other.delete("a")
    assert store.list() == ["bc/3"]


def test_more_files_than_one_listing_has(store: Store) -> None:
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda number: store.write(f"many/{number:04d}", b""), range(1100)))
    assert store.list("many") == [f"many/{number:04d}" for number in range(1100)]
    store.delete("many")
    assert store.list() == []


def test_create_only_once(store: Store) -> None:
    assert store.create("claim", b"first") is True
    assert store.create("claim", b"second") is False
    assert store.read("claim") == b"first"


@pytest.mark.parametrize("own_client", [False, True])
def test_of_eight_creators_one_wins(store: Store, own_client: bool) -> None:
    stores = [open_store(store.url) if own_client else store for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for turn in range(20):
            name = f"race/{turn}"
            won = list(pool.map(lambda n, name=name: stores[n].create(name, b"%d" % n), range(8)))
            assert won.count(True) == 1
            assert store.read(name) == b"%d" % won.index(True)


def test_globs_and_files_of_the_catalog(store: Store, bucket: str) -> None:
    store.write("x.parquet", b"1")
    fs, path = filesystem(f"{bucket}/runs/*/*.parquet")
    assert fs.glob(path) == [store.path("x.parquet")]
    fs, path = filesystem(f"{store.url}/x.parquet")
    with fs.open(path) as file:
        assert file.read() == b"1"


def _refusals(url: str) -> list[str]:
    """What each verb says; all are to fail."""
    store = open_store(url)
    verbs = {
        "exists": lambda: store.exists("x"),
        "read": lambda: store.read("x"),
        "range": lambda: store.read("x", 0, 1),
        "write": lambda: store.write("x", b""),
        "create": lambda: store.create("x", b""),
        "list": store.list,
        "dirs": store.dirs,
        "size": lambda: store.size("x"),
        "delete": lambda: store.delete("x"),
    }
    said = []
    for name, verb in verbs.items():
        with pytest.raises(StoreError) as caught:
            pytest.fail(f"{name} returned {verb()}")
        said.append(str(caught.value))
    return said


def test_wrong_secret(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    for text in _refusals(f"{bucket}/runs"):
        assert "refuses the secret key (SignatureDoesNotMatch)" in text
        assert "AWS_SECRET_ACCESS_KEY" in text


def test_unknown_access_key(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    for text in _refusals(f"{bucket}/runs"):
        assert "does not know the access key (InvalidAccessKeyId)" in text


def _deny(s3: Gateway, bucket: str, action: str) -> None:
    arn = f"arn:aws:s3:::{bucket.removeprefix('s3://')}"
    statement = {"Effect": "Deny", "Principal": "*", "Action": action, "Resource": [arn, f"{arn}/*"]}
    policy = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
    client = s3.client()
    client.put_bucket_policy(Bucket=bucket.removeprefix("s3://"), Policy=policy)
    client.close()


def test_access_denied(s3: Gateway, bucket: str) -> None:
    # A file that is not there is answered with 404 even to those who may not read.
    open_store(f"{bucket}/runs").write("x", b"x")
    _deny(s3, bucket, "s3:*")
    for text in _refusals(f"{bucket}/runs"):
        assert "denies access to this user" in text


def test_refused_deletion_is_not_silent(s3: Gateway, bucket: str, store: Store) -> None:
    store.write("kept/a", b"a")
    _deny(s3, bucket, "s3:DeleteObject")
    with pytest.raises(StoreError, match="denies access to this user"):
        store.delete("kept")


def test_missing_bucket(s3: Gateway) -> None:
    for text in _refusals("s3://no-such-bucket/runs"):
        assert f"the bucket does not exist at {s3.endpoint}; create it, or correct the URL" in text


def test_no_credentials(bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(variable)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", f"{tmp_path}/none")
    monkeypatch.setenv("AWS_CONFIG_FILE", f"{tmp_path}/none")
    for text in _refusals(f"{bucket}/runs"):
        assert "no S3 credentials were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in text


def test_half_of_the_credentials(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    for text in _refusals(f"{bucket}/runs"):
        assert "only half of the S3 credentials" in text
