"""If one checkpoint verified before, one verifies after: saves, crashes, damage, retention."""

import errno
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from lascaux.checkpoint.load import list_checkpoints, newest_valid, verify_checkpoint
from lascaux.checkpoint.manifest import step_of
from lascaux.checkpoint.save import remove_old
from lascaux.errors import CheckpointError
from tests.unit.checkpoint.builders import folder_in_memory, is_checkpoint_of, save
from tests.unit.checkpoint.faults import AtCall, Crash, calls_go_through, crash, failing


class Histories(RuleBasedStateMachine):
    """Saves, crashes, damage and retention in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.context = folder_in_memory()
        self.folder = self.context.__enter__()
        self.step = 0

    def teardown(self) -> None:
        self.context.__exit__(None, None, None)

    def intact(self) -> set[int]:
        found: set[int] = set()
        for path in list_checkpoints(self.folder):
            step = step_of(path.name)
            assert step is not None
            try:
                verify_checkpoint(path)
            except CheckpointError:
                continue
            assert is_checkpoint_of(path, step)
            found.add(step)
        return found

    def keeps_one(self, action: Callable[[], Any]) -> None:
        before = self.intact()
        try:
            action()
        except (CheckpointError, Crash):
            pass
        assert self.intact() or not before

    @initialize()
    def first(self) -> None:
        self.saved()

    @rule()
    def saved(self) -> None:
        self.step += 1
        save(self.folder, self.step)
        assert self.step in self.intact()

    @rule(k=st.integers(1, 60))
    def saved_and_crashed(self, k: int) -> None:
        fault = AtCall(k, crash, persists=True)
        self.keeps_one(lambda: self.with_fault(fault, lambda: save(self.folder, self.step + 1)))

    @rule(k=st.integers(1, 40), persists=st.booleans())
    def saved_on_a_full_disk(self, k: int, persists: bool) -> None:
        fault = AtCall(k, failing(errno.ENOSPC), persists)
        self.keeps_one(lambda: self.with_fault(fault, lambda: save(self.folder, self.step + 1)))

    @rule(keep=st.integers(0, 3))
    def retained(self, keep: int) -> None:
        self.keeps_one(lambda: remove_old(self.folder, keep))

    @rule(keep=st.integers(1, 3), k=st.integers(1, 40))
    def retained_and_crashed(self, keep: int, k: int) -> None:
        fault = AtCall(k, crash, persists=True)
        self.keeps_one(lambda: self.with_fault(fault, lambda: remove_old(self.folder, keep)))

    @rule(data=st.data())
    def damaged(self, data: st.DataObject) -> None:
        paths = [path for folder in list_checkpoints(self.folder) for path in folder.iterdir()]
        path = data.draw(st.sampled_from(sorted(paths)))
        content = bytearray(path.read_bytes())
        if not content:
            return
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1
        path.write_bytes(content[: data.draw(st.sampled_from([len(content), 0]))])

    @rule()
    def resumed(self) -> None:
        path, _ = newest_valid(self.folder)
        steps = self.intact()
        found = None if path is None else step_of(path.name)
        assert found == (max(steps) if steps else None)
        self.step = found or 0

    def with_fault(self, fault: AtCall, action: Callable[[], Any]) -> None:
        with calls_go_through(fault):
            action()


TestHistories = Histories.TestCase
TestHistories.settings = settings(
    max_examples=60,
    stateful_step_count=20,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
