"""What the sensors share: a poll, asked by a worker or by the triggerer, and one end for both."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from airflow.sdk import BaseSensorOperator, PokeReturnValue, conf

from airflow_mlops.core.errors import rebuild_error
from airflow_mlops.core.extension import load_object
from airflow_mlops.exceptions import TransientError
from airflow_mlops.run_windows import window_spec
from airflow_mlops.triggers.poll import PollTrigger, Waiting, WaitLog

if TYPE_CHECKING:
    from airflow.sdk import Context


class PollSensor(BaseSensorOperator):
    """Wait until a poll has something to say; without a worker when deferrable.

    :param deferrable: wait in the triggerer; default from ``[operators] default_deferrable``.
    """

    #: Import path of the poll; it runs in a worker or in the triggerer.
    poll: ClassVar[str]

    def __init__(
        self,
        *,
        deferrable: bool = conf.getboolean("operators", "default_deferrable", fallback=False),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.deferrable = deferrable
        self._waits = WaitLog()

    def poll_arguments(self) -> dict[str, Any]:
        """Turn the rendered arguments into the poll's; JSON, no credentials."""
        raise TypeError(f"{type(self).__name__} must say what it asks {self.poll}")

    def execute(self, context: Context) -> dict[str, Any]:
        """Wait, then give what was found."""
        if self.deferrable:
            from datetime import timedelta

            self.defer(
                trigger=PollTrigger(
                    poll=self.poll, arguments=self.poll_arguments(), poke_interval=self.poke_interval
                ),
                method_name="execute_complete",
                timeout=timedelta(seconds=self.timeout),
            )
        return self.execute_complete(context, {"found": super().execute(context)})

    def poke(self, context: Context) -> PokeReturnValue:
        """Look once; a service that does not answer is waited for."""
        try:
            found = load_object(self.poll)(**self.poll_arguments())
        except TransientError as err:
            self._waits.say(self.log, err)
            found = None
        if isinstance(found, Waiting):
            self._waits.say(self.log, found)
            found = None
        return PokeReturnValue(is_done=found is not None, xcom_value=found)

    def execute_complete(self, context: Context, event: dict[str, Any]) -> dict[str, Any]:
        """Give what was found, or raise what ended the wait: the same error as in a worker, so it is retried alike."""
        if "error" in event:
            raise rebuild_error(event["error"])
        found: dict[str, Any] = event["found"]
        self.log.info("found %s", found)
        return found


class WindowSensor(PollSensor):
    """Wait for something about a window; a subclass has ``window_start`` and ``window_end``, by default the run's."""

    window_start: Any
    window_end: Any

    def execute(self, context: Context) -> dict[str, Any]:
        """Find the window, which in a partitioned run its key names, then wait.

        :raises ValueError: there is no window, or the arguments are no times in order.
        """
        window = window_spec(self.window_start, self.window_end, context)
        if window is None:
            raise ValueError(f"{type(self).__name__} needs a window: give window_start and window_end")
        self.window_start, self.window_end = window["start"], window["end"]
        return super().execute(context)
