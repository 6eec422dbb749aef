"""`rest serve --engine ray` on a cluster of this machine, two replicas of a tiny model: full,
killed, stopped.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
from live import collect, cut, tone, until
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from stills import face_png
from tiny_head import make_head

from rest_lightning.errors import UserError
from rest_lightning.serve.client import LiveClient, Sound
from rest_lightning.talking_head import ModelOptions

pytest.importorskip("ray.serve", reason="the extra `ray` serves replicas")

from processes import alive, descendants, listening

MOST_S = 300.0  # for anything that a busy machine may be slow at
_PLACES = 2  # of each replica
LOOPBACK = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}
# A process that has a cluster of its own, as `rest serve --engine ray` does, and an actor in it.
DRIVER = """
import sys
from rest_lightning import ray_cluster
with ray_cluster.joined({}, {"object_store_memory": 80_000_000, "num_cpus": 1}):
    import ray
    class Actor:
        def answer(self): return 1
    actor = ray.remote(num_cpus=0)(Actor).remote()
    print(ray.get(actor.answer.remote()), flush=True)
    sys.stdin.read()
"""


class Front:
    """The process of ``rest serve --engine ray`` and what it has printed."""

    def __init__(self, model: Path, log: Path) -> None:
        words = [
            "serve",
            "--engine",
            "ray",
            "--replicas",
            "2",
            "--max-sessions",
            str(_PLACES),
            "--port",
            "0",
        ]
        words += ["--model", str(model), "--device", "cpu", "--threads", "1", "--grace", "20"]
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        self.log = log
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "rest_lightning", *words],
                stdout=out,
                stderr=subprocess.STDOUT,
                env=environment,
            )
        self.url = ""
        self.below: set[int] = set()

    def start(self) -> None:
        """Waits until it serves."""
        self.url = self.wait_for(r"open (http://\S+) in a browser").group(1)
        self.note_processes()

    def note_processes(self) -> None:
        """Remembers what must have ended when the front has."""
        self.below |= descendants(self.process.pid)

    def wait_for(self, pattern: str) -> re.Match[str]:
        """The first match in what was printed."""
        end_s = time.monotonic() + MOST_S
        while time.monotonic() < end_s:
            if found := re.search(pattern, self.log.read_text(errors="replace")):
                return found
            assert self.process.poll() is None, self.log.read_text(errors="replace")[-3000:]
            time.sleep(0.1)
        raise AssertionError(f"no {pattern!r} in: {self.log.read_text(errors='replace')[-3000:]}")

    def begun(self) -> list[dict[str, Any]]:
        """Log lines of sessions that the front has begun to pass on, in their order."""
        lines = [
            line
            for line in self.log.read_text(errors="replace").splitlines()
            if line.startswith("{")
        ]
        return [each for each in map(json.loads, lines) if each["message"] == "session begins"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    make_head(1).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def front(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    front = Front(model, tmp_path_factory.mktemp("ray") / "log")
    try:
        front.start()
        yield front
    finally:
        if front.process.poll() is None:
            front.note_processes()
            front.process.terminate()
            try:
                front.process.wait(MOST_S)
            except subprocess.TimeoutExpired:
                front.process.kill()
        assert_ended(front.below)


def assert_ended(pids: set[int], within_s: float = 30.0) -> None:
    """What is left then is ended here."""
    end_s = time.monotonic() + within_s
    while alive(pids) and time.monotonic() < end_s:
        time.sleep(0.2)
    left = {pid: Path(f"/proc/{pid}/cmdline").read_bytes()[:200] for pid in alive(pids)}
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left, f"processes are left behind: {left}"


async def free(url: str, num_active: int = 0) -> None:
    """Waits until so many sessions are left."""
    async with asyncio.timeout(MOST_S), aiohttp.ClientSession() as http:
        while (await (await http.get(f"{url}/healthz")).json())["sessions"] != num_active:
            await asyncio.sleep(0.1)


@pytest.mark.slow
def test_speech_through_a_replica_comes_back_whole(front: Front) -> None:
    """Also with a portrait that was uploaded to the front, whichever replica shows it."""
    speech = tone(0.9)

    async def upload() -> str:
        form = aiohttp.FormData()
        form.add_field("file", face_png(), filename="face.png")
        async with (
            aiohttp.ClientSession(headers={"Origin": front.url}) as http,
            http.post(f"{front.url}/api/portraits", data=form) as response,
        ):
            answer = await response.json()
            assert response.status == 200, answer
            async with http.get(f"{front.url}/api/portraits/{answer['id']}.png") as shown:
                assert Image.open(BytesIO(await shown.read())).size == (256, 256)
            return str(answer["id"])

    async def scenario() -> None:
        portrait = await upload()
        async with AsyncExitStack() as stack:
            clients = [
                await stack.enter_async_context(LiveClient(front.url, portrait)) for _ in range(2)
            ]
            for received in await asyncio.gather(
                *(collect(client, cut(speech, 320)) for client in clients)
            ):
                sound = np.concatenate(
                    [each.samples for each in received if isinstance(each, Sound)]
                )
                assert speech.tobytes() in sound.tobytes()
                assert received[-1] == {"type": "bye", "reason": "the session has ended"}
        with pytest.raises(UserError, match="unknown or was forgotten"):
            async with LiveClient(front.url, "uNobodysPortrait"):
                pass
        await free(front.url)

    asyncio.run(scenario())


@pytest.mark.slow
def test_a_full_replica_is_passed_over_and_a_full_cluster_refuses(front: Front) -> None:
    already = len(front.begun())

    async def scenario() -> dict[str, float]:
        async with AsyncExitStack() as stack:
            for _ in range(2 * _PLACES):
                await stack.enter_async_context(LiveClient(front.url))
            with pytest.raises(UserError, match=r"4 of 4 sessions"):
                async with LiveClient(front.url):
                    pass
            async with (
                aiohttp.ClientSession() as http,
                http.get(f"{front.url}/metrics") as response,
            ):
                families = text_string_to_metric_families(await response.text())
                values = {family.name: family.samples for family in families}
        await free(front.url)
        (replicas,) = values["rest_replicas"]
        assert replicas.value == 2 and replicas.labels == {"replica": "front"}
        return {each.labels["replica"]: each.value for each in values["rest_sessions"]}

    sessions = asyncio.run(scenario())
    begun = Counter(each["replica"] for each in front.begun()[already:])
    assert sorted(begun.values()) == [_PLACES, _PLACES]
    assert sessions == {"front": 0.0, **begun}


@pytest.mark.slow
def test_nobody_but_this_machine_can_reach_any_of_its_processes(front: Front) -> None:
    """The front, its replicas, and all of Ray's own."""
    front.note_processes()
    found = listening({front.process.pid, *front.below})
    assert found and found <= LOOPBACK


@pytest.mark.slow
def test_nothing_of_ray_outlives_a_front_that_is_killed() -> None:
    words = [sys.executable, "-c", DRIVER]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, env=environment) as driver:
        try:
            assert driver.stdout is not None and driver.stdout.readline() == b"1\n"
        finally:
            below = descendants(driver.pid)
            driver.kill()
    assert len(below) > 3  # Ray's own, the actor's, and the one that ends them
    # A worker that was just starting looks for the head that has gone for up to a minute.
    assert_ended(below, within_s=90.0)


@asynccontextmanager
async def patient_client(url: str) -> AsyncIterator[LiveClient]:
    """A session as soon as there is a place."""
    async with asyncio.timeout(MOST_S):
        while True:
            client = LiveClient(url)
            try:
                await client.__aenter__()
                break
            except UserError as error:
                if "machines that work are full" not in str(error):
                    raise
    try:
        yield client
    finally:
        await client.__aexit__(None, None, None)


@pytest.mark.slow
def test_sessions_of_a_killed_replica_are_told_and_reconnect_to_the_other(front: Front) -> None:
    already = len(front.begun())

    async def scenario() -> None:
        async with AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(LiveClient(front.url)) for _ in range(2)]
            begun = front.begun()[already:]
            # Sessions are not dealt out in turn.
            while len({each["replica"] for each in begun}) < 2:
                clients.append(await stack.enter_async_context(LiveClient(front.url)))
                begun = front.begun()[already:]
            doomed, killed_pid = clients[0], begun[0]["pid"]
            spared = clients[[each["replica"] != begun[0]["replica"] for each in begun].index(True)]
            for client in clients[1:]:
                if client is not spared:
                    await client.end()
            await until(spared, "chunk", MOST_S)
            os.kill(killed_pid, signal.SIGKILL)
            error = await until(doomed, "error", MOST_S)
            assert error["code"] == "lost" and "start a new one" in error["message"]
            assert await doomed.receive() is None  # no bye: the connection was cut
            await free(front.url, 1)
            # The other replica has one place left, so that two need the killed one's successor.
            later = [
                await stack.enter_async_context(patient_client(front.url)) for _ in range(_PLACES)
            ]
            replicas = {each["replica"] for each in front.begun()[-_PLACES:]}
            assert begun[0]["replica"] not in replicas
            assert replicas - {each["replica"] for each in begun}
            for client in (spared, *later):
                await until(client, "chunk", MOST_S)
        await free(front.url)

    asyncio.run(scenario())


@pytest.mark.slow
def test_stopping_lets_a_session_finish(front: Front) -> None:
    """The last one: afterwards there is no front."""

    async def scenario() -> list[Any]:
        async with LiveClient(front.url) as client:
            await until(client, "chunk", MOST_S)
            front.note_processes()
            front.process.terminate()
            front.wait_for("stopping: sessions may finish")
            with pytest.raises(UserError, match="the server is stopping"):
                async with LiveClient(front.url):
                    pass
            return await collect(client, cut(tone(0.5), 320))

    received = asyncio.run(scenario())
    assert received[-1] == {"type": "bye", "reason": "the session has ended"}
    assert front.process.wait(MOST_S) == 0


FOUR_GPUS = {"CPU": 16.0, "GPU": 4.0}


@pytest.mark.parametrize(
    ("cluster", "device", "threads", "replicas", "expected"),
    [
        ({"CPU": 8.0}, "auto", None, None, ("cpu", 8, 1, {"num_cpus": 8.0})),
        ({"CPU": 8.0}, "auto", None, 3, ("cpu", 2, 3, {"num_cpus": 2.0})),
        ({"CPU": 8.0}, "cpu", 1, 3, ("cpu", 1, 3, {"num_cpus": 1.0})),
        ({"CPU": 2.0}, "auto", None, 4, ("cpu", 1, 4, {"num_cpus": 0.5})),
        (FOUR_GPUS, "auto", None, None, ("cuda", None, 4, {"num_gpus": 1.0, "num_cpus": 1.0})),
        (FOUR_GPUS, "cuda", 2, 3, ("cuda", 2, 3, {"num_gpus": 1.0, "num_cpus": 1.0})),
        (FOUR_GPUS, "cpu", None, 2, ("cpu", 8, 2, {"num_cpus": 8.0})),
    ],
)
def test_a_cluster_is_divided(
    cluster: dict[str, float],
    device: str,
    threads: int | None,
    replicas: int | None,
    expected: tuple[Any, ...],
) -> None:
    from rest_lightning.serve.ray_engine import ReplicaOptions, share

    wanted = ModelOptions(device=device, num_threads=threads)
    model, num_replicas, resources = share(cluster, ReplicaOptions(wanted, replicas))
    assert (model.device, model.num_threads, num_replicas, resources) == expected


@pytest.mark.parametrize(
    ("cluster", "device", "replicas", "told"),
    [
        ({"CPU": 8.0}, "cuda", None, "expected GPUs for --device cuda, got a cluster without"),
        ({"CPU": 8.0, "GPU": 2.0}, "auto", 3, "expected at most 2 replicas, one per GPU, got 3"),
    ],
)
def test_a_cluster_too_small_is_told(
    cluster: dict[str, float], device: str, replicas: int | None, told: str
) -> None:
    from rest_lightning.serve.ray_engine import ReplicaOptions, share

    with pytest.raises(UserError, match=told):
        share(cluster, ReplicaOptions(ModelOptions(device=device), replicas))


def test_expositions_are_merged_without_a_loss() -> None:
    from rest_lightning.serve.metrics import Metrics
    from rest_lightning.serve.ray_engine import merged

    servers = {"front": Metrics(), "a": Metrics(), "b": Metrics()}
    for place, each in enumerate(servers.values()):
        each.frames.inc(24 * place)
        each.ended.labels("gone").inc(place)
        each.compute_s.observe(0.1 + place)
    texts = {name: each.exposition().decode() for name, each in servers.items()}

    def samples(text: str) -> dict[tuple[Any, ...], float]:
        families = text_string_to_metric_families(text)
        return {
            (family.name, family.type, each.name, *sorted(each.labels.items())): each.value
            for family in families
            for each in family.samples
        }

    expected = {
        (*key[:3], *sorted([*key[3:], ("replica", name)])): value
        for name, text in texts.items()
        for key, value in samples(text).items()
    }
    text = merged(texts).decode()
    assert samples(text) == expected
    assert (
        text.count("# TYPE rest_frames_total counter") == 1
    )  # a family in two pieces is no valid exposition


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (
            "The deployment failed to start 3 times in a row.\nTraceback (most recent call last):\n"
            '  File "talking_head.py", line 1, in load\n'
            "rest_lightning.errors.UserError: expected a model folder, got /m: make one\n",
            "expected a model folder, got /m: make one",
        ),
        (
            "Killed\n  by  the system",
            "expected replicas that start, got 'Killed by the system': see their log",
        ),
    ],
)
def test_why_replicas_do_not_start_is_told_in_one_line(told: str, expected: str) -> None:
    from rest_lightning.serve.ray_engine import why

    assert str(why(told)) == expected
