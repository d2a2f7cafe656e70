"""The flag that a signal sets, and the agreement of ranks on the step at which they stop; ranks here are threads."""

import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from launch.stop import (
    MOST_STEPS,
    POLL_SECONDS,
    StopAgreement,
    Stopped,
    StopRequest,
    signals_caught,
    signals_flag,
    stop_request,
)
from tests.helpers.processes import PROGRAMS, ROOT, execute

pytestmark = pytest.mark.timeout(60)


def test_a_request_is_false_until_a_signal_and_keeps_the_first_reason() -> None:
    request = StopRequest()
    assert not request
    request.handle(signal.SIGUSR1, None)
    request.handle(signal.SIGTERM, None)
    assert request
    assert request.reason == "SIGUSR1"


def test_two_interrupts_at_once_are_one_since_torchrun_repeats_the_terminals() -> None:
    request = StopRequest()
    request.handle(signal.SIGINT, None)
    request.handle(signal.SIGINT, None)  # would end this process if it counted
    assert request.reason == "SIGINT"


def test_handlers_are_installed_before_torch_is_imported() -> None:
    assert execute([sys.executable, str(PROGRAMS / "catch_signals.py"), "early"]).out.split() == ["SIGTERM", "True"]


ALL = ["SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGXCPU"]


@pytest.mark.parametrize("ignored", [[], [signal.SIGHUP], [signal.SIGINT, signal.SIGQUIT]],
                         ids=["nothing ignored", "SIGHUP ignored, as by nohup", "as in a script's background"])
def test_every_stop_signal_is_caught_but_a_hangup_that_was_ignored_on_entry(ignored: list[signal.Signals]) -> None:
    def ignore() -> None:
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)

    done = subprocess.run([sys.executable, str(PROGRAMS / "catch_signals.py"), "all"], capture_output=True, text=True,
                          preexec_fn=ignore)
    heard = dict(line.split() for line in done.stdout.splitlines())
    assert heard == {name: "None" if name == "SIGHUP" and signal.SIGHUP in ignored else name for name in ALL}


def test_the_stop_signals_are_listed_in_one_place() -> None:
    naming = [path.relative_to(ROOT).as_posix() for package in ("launch", "datasets", "trainers", "slurm")
              for path in (ROOT / package).rglob("*") if path.suffix in (".py", ".sbatch", "") and path.is_file()
              and re.search("SIG(HUP|QUIT|USR2|XCPU)", path.read_text())]
    assert naming == ["launch/stop.py"]


def test_torchrun_passes_on_whatever_this_flag_names(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.elastic.multiprocessing import api

    handled = []
    monkeypatch.setattr(api.signal, "signal", lambda number, handler: handled.append(number.name))
    monkeypatch.setenv("TORCHELASTIC_SIGNALS_TO_HANDLE", signals_flag().partition("=")[2])
    context = object.__new__(api.SubprocessContext)
    monkeypatch.setattr(api.SubprocessContext, "_start", lambda self: None)
    context._tail_logs = []
    context.start()
    assert handled == ALL


def test_a_second_interrupt_a_second_later_ends_the_process_at_once() -> None:
    process = subprocess.Popen([sys.executable, str(PROGRAMS / "catch_signals.py"), "wait"], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    os.kill(process.pid, signal.SIGINT)
    time.sleep(1.2)
    assert process.poll() is None
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(timeout=5) == 130
    process.stdout.close()


def test_a_signal_that_comes_while_a_finished_process_is_taken_down_does_not_change_its_exit_code() -> None:
    ended = execute([sys.executable, str(PROGRAMS / "catch_signals.py"), "late"])
    assert (ended.code, ended.out) == (0, "late")


def test_votes_are_never_more_than_a_bounded_number_of_steps_apart() -> None:
    agreement = StopAgreement(1)
    assert agreement.due()  # the first step votes: a stop may have come while the ranks started
    assert agreement.vote(StopRequest(), 3) == 3
    steps = next(step for step in range(1, 2 * MOST_STEPS) if agreement.due())
    assert 1 < steps <= MOST_STEPS  # steps without any work in them


def test_a_vote_after_a_request_is_to_stop() -> None:
    agreement, request = StopAgreement(1), StopRequest()
    assert agreement.vote(request) == 0
    request.ask("test")
    with pytest.raises(Stopped, match="test"):
        agreement.vote(request)


def test_steps_as_slow_as_the_poll_vote_every_time() -> None:
    agreement = StopAgreement(1)
    for _ in range(3):
        time.sleep(POLL_SECONDS * 1.1)
        assert agreement.due()
        agreement.vote(StopRequest())


def test_a_handler_runs_in_the_main_thread_only() -> None:
    from launch.stop import catch_signals

    failures: list[Exception] = []

    def install() -> None:
        try:
            catch_signals()
        except ValueError as error:
            failures.append(error)

    thread = threading.Thread(target=install)
    thread.start()
    thread.join()
    assert failures


def test_the_callers_signal_handlers_come_back_and_the_request_ends_with_the_block() -> None:
    def own(number: int, frame: object) -> None:
        raise AssertionError

    before = signal.signal(signal.SIGUSR1, own)
    try:
        with signals_caught() as request:
            os.kill(os.getpid(), signal.SIGUSR1)
            assert request.reason == "SIGUSR1"
        assert signal.getsignal(signal.SIGUSR1) is own
        assert not stop_request()
    finally:
        signal.signal(signal.SIGUSR1, before)
