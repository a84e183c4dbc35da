"""What the gateway's bytes are taken apart into, however they are split; and the connection around it."""

from __future__ import annotations

import itertools
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.stores.contract import in_a_fork
from veltrix_mw.stores.etcd_stream import Connection, Lines, LineStream, NotHttp, Response, Unanswered

WITHIN_S = 10.0

bodies = st.binary(max_size=300)


def chunked(pieces: Sequence[bytes], *, trailer: bytes = b"") -> bytes:
    framed = b"".join(b"%x;ext=1\r\n%s\r\n" % (len(piece), piece) for piece in pieces if piece)
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + framed + b"0\r\n" + trailer + b"\r\n"


def with_length(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


def split(data: bytes, cuts: Sequence[int]) -> list[bytes]:
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[begin:end] for begin, end in itertools.pairwise(edges)]


def fed(response: Response, pieces: Sequence[bytes]) -> bytes:
    return b"".join(response.feed(piece) for piece in pieces)


cuts = st.lists(st.integers(0, 5000), max_size=30)


@given(pieces=st.lists(bodies, max_size=6), cuts=cuts)
def test_a_chunked_body_is_the_same_however_it_is_split(pieces: list[bytes], cuts: list[int]) -> None:
    response = Response()
    raw = chunked(pieces, trailer=b"Grpc-Trailer-Content-Type: application/grpc\r\n")
    assert fed(response, split(raw, cuts)) == b"".join(pieces)
    assert (response.done, response.reusable, response.status) == (True, True, 200)


@given(body=bodies, cuts=cuts)
def test_a_body_of_known_length_is_the_same_however_it_is_split(body: bytes, cuts: list[int]) -> None:
    response = Response()
    assert fed(response, split(b"HTTP/1.1 100 Continue\r\n\r\n" + with_length(body), cuts)) == body
    assert (response.done, response.reusable) == (True, True)


@given(body=bodies, cuts=cuts)
def test_a_body_without_a_length_ends_with_the_connection(body: bytes, cuts: list[int]) -> None:
    response = Response()
    assert fed(response, split(b"HTTP/1.0 400 Bad Request\r\n\r\n" + body, cuts)) == body
    assert not response.done
    response.end()
    assert (response.done, response.reusable, response.status) == (True, False, 400)


@given(raw=st.one_of(st.just(chunked([b"abc", b"defg"])), st.just(with_length(b"abcdefg"))), data=st.data())
def test_a_response_that_is_cut_off_is_never_taken_for_whole(raw: bytes, data: st.DataObject) -> None:
    response = Response()
    response.feed(raw[: data.draw(st.integers(0, len(raw) - 1))])
    assert not response.done
    with pytest.raises(NotHttp):
        response.end()


@given(raw=st.binary(max_size=400), cuts=cuts)
def test_noise_is_refused_or_waited_for_and_nothing_else(raw: bytes, cuts: list[int]) -> None:
    for begin in (b"", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"):
        results = []
        for pieces in ([begin + raw], split(begin + raw, cuts)):
            response = Response()
            try:
                body = fed(response, pieces)
                results.append((body, response.done))
            except NotHttp:
                results.append((b"", None))
        assert results[0] == results[1]


@pytest.mark.parametrize(
    "raw",
    [
        b"\x15\x03\x01\x00\x02\x02\x16",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1 abc\r\n\r\n",
        b"HTTP/2 200\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1_0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nab\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"a" * 70_000,
    ],
)
def test_what_is_no_response_is_refused(raw: bytes) -> None:
    with pytest.raises(NotHttp):
        Response().feed(raw)


def test_what_comes_after_a_response_keeps_its_connection_from_being_used_again() -> None:
    response = Response()
    assert response.feed(with_length(b"a") + b"HTTP/1.1 200 OK") == b"a"
    assert (response.done, response.reusable) == (True, False)
    closing = Response()
    closing.feed(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
    assert (closing.done, closing.reusable) == (True, False)


@given(lines=st.lists(st.binary(max_size=80).map(lambda raw: raw.replace(b"\n", b"")), max_size=8), cuts=cuts)
def test_lines_are_the_same_however_they_are_split(lines: list[bytes], cuts: list[int]) -> None:
    splitter = Lines()
    raw = b"".join(line + b"\n" for line in lines) + b"begun"
    seen = [line for piece in split(raw, cuts) for line in splitter.feed(piece)]
    assert seen == [line for line in lines if line.strip()]
    assert splitter.feed(b" and ended\n") == [b"begun and ended"]


# --- connections


@pytest.fixture
def pair() -> Iterator[tuple[Connection, socket.socket]]:
    mine, other = socket.socketpair()
    connection = Connection(mine)
    yield connection, other
    connection.close()
    other.close()


Pair = tuple[Connection, socket.socket]


def soon() -> float:
    return time.monotonic() + WITHIN_S


def test_a_read_that_timed_out_loses_nothing(pair: Pair) -> None:
    connection, other = pair
    stream = LineStream(connection, Response(), b"")
    raw = chunked([b'{"a":', b"1}\n"])
    for byte in raw[: raw.index(b"\n0\r\n") - 3]:
        other.sendall(bytes([byte]))
        assert stream.receive(0.0) == []
    other.sendall(raw[raw.index(b"\n0\r\n") - 3 :])
    assert stream.receive(soon()) == [b'{"a":1}']


@pytest.mark.parametrize("is_closed", [False, True], ids=["the connection lives on", "it ends, too"])
def test_the_end_of_a_stream_is_an_error_also_in_good_order(pair: Pair, is_closed: bool) -> None:
    connection, other = pair
    stream = LineStream(connection, Response(), b"")
    other.sendall(chunked([b"one\n"]))
    if is_closed:
        other.shutdown(socket.SHUT_WR)
    assert stream.receive(soon()) == [b"one"]
    with pytest.raises(EOFError):
        stream.receive(soon())


def test_interrupting_ends_a_read_in_another_thread(pair: Pair) -> None:
    connection, _ = pair
    begun = threading.Event()

    def read() -> bytes:
        begun.set()
        return connection.receive(time.monotonic() + 600)

    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read)
        begun.wait(WITHIN_S)
        connection.interrupt()
        assert reading.result(WITHIN_S) == b""


def test_an_exchange_ends_by_its_deadline_though_bytes_keep_dripping(pair: Pair) -> None:
    connection, other = pair
    done = threading.Event()

    def drip() -> None:
        other.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
        while not done.wait(0.01):
            other.sendall(b"x")

    with ThreadPoolExecutor(1) as pool:
        dripping = pool.submit(drip)
        try:
            with pytest.raises(Unanswered) as caught:
                connection.exchange(b"", begun_by_s=soon(), by_s=time.monotonic() + 0.2)
        finally:
            done.set()
        dripping.result(WITHIN_S)
    assert isinstance(caught.value.reason, TimeoutError)


def test_a_connection_is_at_rest_only_while_nothing_came(pair: Pair) -> None:
    connection, other = pair
    assert connection.is_at_rest()
    other.sendall(b"x")
    assert not connection.is_at_rest()
    assert connection.receive(soon()) == b"x"
    assert connection.is_at_rest()
    other.close()
    assert not connection.is_at_rest()


def test_a_child_says_nothing_on_what_it_inherited_and_the_parent_goes_on(pair: Pair) -> None:
    connection, other = pair

    def child() -> None:
        other.close()
        with pytest.raises(OSError, match="descriptor"):
            connection.send(b"from the child", soon())

    in_a_fork(child)
    connection.send(b"from the parent", soon())
    assert other.recv(100) == b"from the parent"


def test_long_lines_cost_no_more_a_byte_than_short_ones() -> None:
    """Copies are counted, not timed: each byte is joined once."""
    splitter = Lines()
    for _ in range(2000):
        assert splitter.feed(b"x" * 1000) == []
    assert splitter._begun.count(b"x" * 1000) == 2000
    assert splitter.feed(b"\n") == [b"x" * 2_000_000]
