"""Processes finding each other, answering each other, and agreeing to stop."""

import io
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import redirect_stderr
from itertools import count

import pytest
import torch
import torch.distributed as dist

from launch import finetune
from launch.board import Board
from launch.claim import claimed
from launch.config import FinetuneConfig
from launch.env import Processes, World, joined, read_processes
from launch.errors import ConfigError, DataError, FolderError, LaunchError, WorldError, told_at_once
from launch.files import RunFolder
from launch.mesh import AXES, limited_groups, make_mesh
from launch.model import build_model
from launch.pipeline_job import take_place
from launch.recipe import agreed_config, read_config
from launch.skeleton import share
from launch.stop import StopSignals
from pipeline.errors import WatchdogError
from tests.spawn import ROOT, run_ranks

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


def test_who_this_process_is():
    assert read_processes({}) == Processes()
    assert read_processes({**TORCHRUN, "TORCHELASTIC_RESTART_COUNT": "2"}) == Processes(
        rank=1, world_size=4, local_rank=1, restarts=2, launched=True
    )
    assert read_processes({**TORCHRUN, "TORCHELASTIC_USE_AGENT_STORE": "True"}).keeps_store


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"LOCAL_RANK": None}, "LOCAL_RANK not set"),
        ({"RANK": "one"}, "no whole number"),
        ({"RANK": "4"}, "RANK is 4 and WORLD_SIZE is 4"),
    ],
)
def test_half_an_environment_is_refused(change, text):
    environ = {name: value for name, value in {**TORCHRUN, **change}.items() if value is not None}
    with pytest.raises(WorldError, match=text) as error:
        read_processes(environ)
    assert "torchrun" in str(error.value)


def test_one_process_is_a_world():
    with joined(Processes(), timeout_s=20) as world:
        assert (world.rank, world.world_size, dist.get_world_size()) == (0, 1, 1)
        assert world.board.gather("hello", {"a": 1}) == [{"a": 1}]
    assert not dist.is_initialized()


def test_a_folder_of_no_possible_name_is_refused(tmp_path):
    folder = RunFolder.of(str(tmp_path / ("x" * 300)))
    with joined(Processes(), timeout_s=20) as world, pytest.raises(FolderError, match=r"cannot be written: .*too long"):
        claimed(folder, world, fresh=False).__enter__()


def start_twice(info):
    dist.destroy_process_group()
    answers = []
    for restarts in (0, 1):
        place = Processes(rank=info.rank, world_size=info.world_size, restarts=restarts, launched=True)
        with joined(place, timeout_s=20) as world:
            time.sleep(0.3 * info.rank * restarts)  # late the second time, when its first answer may still be there
            answers.append(world.board.gather("attempt", [restarts, info.rank]))
    return answers


def test_ranks_that_torchrun_starts_again_do_not_hear_those_before():
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)  # torchrun's own: it outlives ranks
    env = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    assert run_ranks(start_twice, 2, env=env) == [[[[0, 0], [0, 1]], [[1, 0], [1, 1]]]] * 2


def board(info, folder, timeout_s=20.0):
    store = dist.FileStore(os.path.join(folder, "store"), info.world_size)
    return Board(store, rank=info.rank, world_size=info.world_size, timeout_s=timeout_s)


def ask_around(info, folder):
    place = board(info, folder)
    first = place.gather("first", info.rank * 10)
    second = place.gather("second", f"rank {info.rank}")
    if info.rank == 0:
        time.sleep(0.3)
    begun = time.monotonic()
    place.leave(timeout_s=10)
    assert (time.monotonic() - begun > 0.1) == (info.rank == 1)
    return first, second


def leave_behind(info, folder, gone):
    place = board(info, folder)
    if info.rank != gone:
        with pytest.raises(WorldError, match=rf"rank {gone} did not answer about 'leaving' within 0\.2 s"):
            place.leave(timeout_s=0.2)


def test_every_rank_hears_every_answer(tmp_path):
    assert run_ranks(ask_around, 2, str(tmp_path)) == [([0, 10], ["rank 0", "rank 1"])] * 2


@pytest.mark.parametrize("gone", [0, 1])
def test_a_rank_that_does_not_leave_is_named(tmp_path, gone):
    run_ranks(leave_behind, 2, str(tmp_path), gone)


def test_a_store_that_ends_with_rank_0_is_not_missed():
    server = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    store = dist.TCPStore("localhost", server.port, is_master=False, wait_for_workers=False)
    place = Board(store, rank=1, world_size=2, timeout_s=20)
    ends = threading.Timer(0.3, lambda held=[server]: held.clear())
    del server
    ends.start()
    place.leave(timeout_s=10)


def fail_together(info, folder):
    def work():
        if info.rank == 1:
            raise DataError("line 3 is bad")
        return info.rank

    place = board(info, folder)
    errors = []
    for topic in ("alone", "again"):
        try:
            place.together(topic, work)
        except LaunchError as error:
            errors.append(str(error))
    return errors, place.together("fine", lambda: info.rank)


def test_what_fails_on_one_rank_fails_on_all(tmp_path):
    first, second = run_ranks(fail_together, 2, str(tmp_path))
    assert first == (["on rank 1: line 3 is bad"] * 2, 0)
    assert second == (["line 3 is bad"] * 2, 1)


def take_turns(info, folder):
    path = os.path.join(folder, "cache")

    def work():
        if info.rank == 0:
            time.sleep(0.3)
            open(path, "w").close()
        return os.path.exists(path)

    def fails():
        raise DataError("no data")

    place = board(info, folder)
    found = place.rank0_first("data", work)
    try:
        place.rank0_first("bad", fails)
    except LaunchError as error:
        return found, str(error)


def test_rank_0_goes_first_and_its_error_is_everyone_s(tmp_path):
    assert run_ranks(take_turns, 2, str(tmp_path)) == [(True, "no data")] * 2


def silence(info, folder):
    if info.rank == 1:
        return None
    try:
        board(info, folder, timeout_s=0.5).gather("weather", "fine")
    except WorldError as error:
        return str(error)


def test_a_rank_that_does_not_answer_is_named(tmp_path):
    text = run_ranks(silence, 2, str(tmp_path))[0]
    assert text.startswith("rank 1 did not answer about 'weather' within 0.5 s")


def work_for_long(info, folder):
    place = board(info, folder, timeout_s=0.5)
    pids = place.gather("process", os.getpid())

    def work(seconds, *, stops):
        time.sleep(seconds)
        if stops and info.rank == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
        return os.getpid()

    assert place.rank0_first("long", lambda: work(0.8, stops=False), timeout_s=20) == os.getpid()
    begun = time.monotonic()
    with pytest.raises(WorldError) as caught:
        place.rank0_first("stopped", lambda: work(0.1, stops=True), timeout_s=20)
    os.kill(pids[0], signal.SIGCONT)
    return str(caught.value), time.monotonic() - begun


def test_a_rank_at_work_is_waited_for_and_one_that_is_stopped_is_not(tmp_path):
    _, (text, waited_s) = run_ranks(work_for_long, 2, str(tmp_path))
    assert text.startswith("rank 0 did not answer about 'stopped' within 0.5 s")
    assert waited_s < 5


def lose_one(info, folder):
    """Rank 2 of three does not come to a collective; what the others say of it."""
    place, told = board(info, folder), io.StringIO()
    place.gather("begin", None)
    if info.rank == 2:
        return ""
    with pytest.MonkeyPatch.context() as patched, redirect_stderr(told):
        patched.setattr("launch.errors._ROLL_CALL_S", 2.0)
        with pytest.raises(WatchdogError), told_at_once(place):
            raise WatchdogError("one of the ranks is gone")
    return told.getvalue()


def test_of_several_ranks_the_one_that_is_lost_is_named(tmp_path):
    told = [f"rank {rank}: error: one of the ranks is gone (no error so far from ranks [2])\n" for rank in (0, 1)]
    assert run_ranks(lose_one, 3, str(tmp_path)) == [*told, ""]


def different_settings(info, folder, flags):
    try:
        agreed_config(flags[info.rank], board(info, folder), prog="finetune", description="")
    except ConfigError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("flags", "texts"),
    [
        ([["--run.seed", "1"], ["--run.seed", "2"]], ["run.seed is 1 and 2"] * 2),
        ([[], ["--chunks.chunk_tokens", "0"]], ["on rank 1: chunk_tokens is 0"] * 2),
        ([["--chunks.chunk_tokens", "0"]] * 2, ["chunk_tokens is 0"] * 2),
    ],
)
def test_settings_are_compared_before_anything_else(tmp_path, flags, texts):
    for found, text in zip(run_ranks(different_settings, 2, str(tmp_path), flags), texts, strict=True):
        assert text in found


def agree_to_stop(info):
    stop = StopSignals()
    agreed = []
    with stop:
        for turn in range(3):
            if turn == 1 and info.rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            agreed.append(stop.agreed(torch.device("cpu"), save=(turn, info.rank) == (0, 1)))
    return agreed


def test_one_rank_s_signal_stops_all_at_the_same_step():
    assert run_ranks(agree_to_stop, 2) == [[(False, True), (True, False), (True, False)]] * 2


CONNECTING = """
from launch.env import joined, read_processes
from launch.stop import StopSignals
with StopSignals():
    print("connecting", flush=True)
    with joined(read_processes()):
        pass
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_rank_that_waits_for_the_others(number):
    """There is nothing to save, and a handler of Python's would run only when they have come."""
    with socket.socket() as port:
        port.bind(("localhost", 0))
        free = str(port.getsockname()[1])
    env = {**os.environ, "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}
    rank = subprocess.Popen(
        [sys.executable, "-c", CONNECTING], env={**env, "MASTER_PORT": free}, cwd=ROOT, stdout=subprocess.PIPE
    )
    try:
        assert rank.stdout.readline() == b"connecting\n"
        time.sleep(0.5)
        rank.send_signal(number)
        assert rank.wait(timeout=10) == -number
    finally:
        rank.kill()
        rank.stdout.close()


def test_signals_are_noted_and_handlers_put_back():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    ours = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where the tests themselves run under nohup
    with StopSignals() as stop:
        assert signal.getsignal(signal.SIGHUP) == signal.getsignal(signal.SIGTERM) != before[0]
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    with StopSignals():
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    signal.signal(signal.SIGHUP, ours)


PROGRAM = """
import sys
from launch.errors import as_program
def main():
    print("begun", flush=True)
    sys.stdin.readline()
    print("more")
    return 1
as_program(main)
"""


@pytest.mark.parametrize(
    ("interrupted", "code", "told"),
    [(True, 130, b"interrupted\n"), (False, -signal.SIGPIPE, b"")],
    ids=["Ctrl-C", "head"],
)
def test_a_command_ends_as_other_programs_do(interrupted, code, told):
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", PROGRAM], cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe) as program:
        assert program.stdout.readline() == b"begun\n"
        if interrupted:
            program.send_signal(signal.SIGINT)
            assert program.wait(timeout=30) == code
        program.stdout.close()
        _, err = program.communicate(b"" if interrupted else b"go on\n", timeout=30)
        assert (program.returncode, err) == (code, told)


def test_a_second_ctrl_c_is_one_line(monkeypatch, capsys):
    def twice(*_, **__):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("launch.finetune.run", twice)
    assert finetune.main([]) == 130
    assert capsys.readouterr().err == "rank 0: interrupted; the same command resumes from the last checkpoint\n"


def make_groups(info, folder, flags, number):
    """Rank 3 stops as it makes its group of this number; what each other rank says of it, and within how long."""
    store = dist.FileStore(os.path.join(folder, "store"), info.world_size)
    place = Board(store, rank=info.rank, world_size=info.world_size, timeout_s=20)
    config = read_config([*flags, "--run.timeout_s=2"], prog="x", description="")
    pids, made, tries = place.gather("process", os.getpid()), dist.new_group, count(1)

    def new_group(*args, **options):
        if info.rank == 3 and next(tries) == number:
            os.kill(os.getpid(), signal.SIGSTOP)
        return made(*args, **options)

    begun = time.monotonic()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("torch.distributed.device_mesh.new_group", new_group)
        with pytest.raises((WorldError, WatchdogError)) as caught:
            take_place(config, World(info.rank, info.world_size, torch.device("cpu"), place))
    waited_s = time.monotonic() - begun
    store.set(f"told/{info.rank}", "")
    if info.rank == 0:
        store.wait([f"told/{rank}" for rank in (1, 2)])
        os.kill(pids[3], signal.SIGCONT)
    return str(caught.value), waited_s


@pytest.mark.parametrize(("flags", "number"), [(["--pipeline.ranks=2"], 1), (["--moe.num_experts=4", "--moe.ep=2"], 6)])
def test_a_rank_that_stops_while_groups_are_made_is_named(tmp_path, flags, number):
    *others, _ = run_ranks(make_groups, 4, str(tmp_path), flags, number)
    for text, waited_s in others:
        assert text.startswith("rank 3 did not answer about 'groups of ranks' within 2 s")
        assert waited_s < 6


def mesh_and_weights(info):
    mesh = make_mesh("cpu", info.world_size)
    torch.manual_seed(info.rank)
    model = build_model(FinetuneConfig().model, None, torch.device("cpu"))
    before = float(sum(param.sum() for param in model.parameters()))
    share([*model.parameters(), *model.buffers()])
    after = float(sum(param.sum() for param in model.parameters()))
    with limited_groups(0.5):
        group = dist.new_group()
    if info.rank == 0:
        begun = time.monotonic()
        with pytest.raises(RuntimeError, match="Timed out"):
            dist.all_reduce(torch.zeros(1), group=group)
        assert time.monotonic() - begun < 10
    dist.barrier()  # the others are there until then
    return mesh.mesh_dim_names, tuple(mesh.shape), dist.get_world_size(mesh.get_group("dp")), before, after


def test_the_mesh_and_the_same_weights_everywhere():
    first, second = run_ranks(mesh_and_weights, 2)
    assert first[:3] == second[:3] == (AXES, (1, 2, 1, 1), 2)
    assert first[3] != second[3]
    assert first[4] == second[4] == first[3]
