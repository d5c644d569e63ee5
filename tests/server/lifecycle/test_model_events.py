"""Changes of models, told to those who watch."""

from __future__ import annotations

from helexa_server.lifecycle.model_events import MAX_BACKLOG, PROGRESS_SECONDS, ModelChange, ModelEvents
from helexa_server.served_model import ServedModel

from .fake_models import Fleet, run, until


def test_a_picture_first_and_then_every_change() -> None:
    async def work() -> None:
        fleet = Fleet(100, {"a": 40, "b": 70})
        with fleet.manager.events.listening() as listener:
            await fleet.use("a")
            await fleet.use("b")
            await fleet.manager.load(fleet.models["b"], pin=True)
            (first, *changes) = listener.pending()
            assert isinstance(first, list) and [(c.model, c.status) for c in first] == [
                ("a", "unloaded"),
                ("b", "unloaded"),
            ]
            told = [(c.model, c.status, c.pinned) for c in changes if isinstance(c, ModelChange)]
            assert list(dict.fromkeys(told)) == [
                ("a", "loading", False),
                ("a", "ready", False),
                ("b", "loading", False),
                ("a", "unloading", False),
                ("a", "unloaded", False),
                ("b", "ready", False),
                ("b", "ready", True),
            ]
            await fleet.manager.close()
            *_, last = listener.pending()
            assert last is None
        with fleet.manager.events.listening() as late:
            assert isinstance(await late.next(), list) and await late.next() is None

    run(work())


def test_the_progress_of_a_stage_is_told_now_and_then_and_a_new_stage_at_once() -> None:
    now = [0.0]
    model = ServedModel("a")
    events = ModelEvents([model], lambda: now[0])
    model.life.on_progress = lambda: events.publish(model)
    with events.listening() as listener:
        for stage, fraction, later in [
            ("weights", 0.1, 0.0),
            ("weights", 0.2, PROGRESS_SECONDS / 2),
            ("weights", 0.3, PROGRESS_SECONDS / 2),
            ("warming", 0.0, 0.0),
            ("warming", 0.0, PROGRESS_SECONDS),
        ]:
            now[0] += later
            model.life.progress = (stage, fraction)
            events.publish(model)
        told = [(c.stage, c.fraction) for c in listener.pending() if isinstance(c, ModelChange)]
    assert told == [("weights", 0.1), ("weights", 0.3), ("warming", 0.0)]


def test_a_listener_that_takes_nothing_gets_a_new_picture_instead() -> None:
    model = ServedModel("a")
    events = ModelEvents([model])
    with events.listening() as slow, events.listening() as quick:
        for i in range(3 * MAX_BACKLOG):
            model.pinned = i % 2 == 0
            events.publish(model)
            assert len(quick.pending()) == (2 if i == 0 else 1)
        items = slow.pending()
        assert len(items) <= MAX_BACKLOG and isinstance(items[0], list)
        last = items[-1] if isinstance(items[-1], ModelChange) else items[0][0]
        assert last.pinned is model.pinned
        events.close()
        assert slow.pending()[-1] is None


def test_progress_from_another_thread_reaches_listeners() -> None:
    async def work() -> None:
        fleet = Fleet(100, {"a": 40})
        fleet.sources["a"].gate.clear()
        with fleet.manager.events.listening() as listener:
            holder = fleet.holding("a")
            stages: set[str] = set()

            def seen() -> bool:
                stages.update(item.stage for item in listener.pending() if isinstance(item, ModelChange))
                return "weights" in stages

            await until(seen)
            fleet.sources["a"].gate.set()
            await holder.entered.wait()
            await holder.leave()

    run(work())
