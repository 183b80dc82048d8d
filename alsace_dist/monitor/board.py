"""A log of TensorBoard: scalars, texts, images, a layout for custom scalars, hyperparameters with their metrics.

With TensorBoard's own writer and messages, for stages that load no torch have something to show, too.
"""

import threading
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

FLUSH_SECONDS = 10
_QUEUE = 1000  # events that wait for the disk
Value = float | str | bool


class Board:
    """Writes events into a directory of its own; what an earlier start logged beyond ``first_step`` is hidden; -1: all.

    Events are written in a thread: what fails there is raised at a later call.
    """

    def __init__(self, directory: Path, first_step: int = 0) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        _say_once()
        directory.mkdir(parents=True, exist_ok=True)
        self._event = Event
        self._writer = EventFileWriter(str(directory), max_queue_size=_QUEUE, flush_secs=FLUSH_SECONDS)
        # A log goes on here: TensorBoard hides events of this step and later ones that were written before.
        self._add(first_step + 1, session_log=SessionLog(status=SessionLog.START))

    def scalar(self, tag: str, value: float, step: int) -> None:
        """A point of a curve."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._add(step, summary=Summary(value=[Summary.Value(tag=tag, simple_value=value)]))

    def text(self, tag: str, text: str, step: int = 0) -> None:
        """A text in Markdown."""
        from tensorboard.plugins.text import metadata

        self._tensor(step, tag, metadata.create_summary_metadata("", ""), text.encode())

    def image(self, tag: str, png: bytes, size: tuple[int, int], step: int = 0) -> None:
        """A picture as PNG; ``size``: its width and height in pixels."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        width, height = size
        image = Summary.Image(height=height, width=width, colorspace=4, encoded_image_string=png)
        self._add(step, summary=Summary(value=[Summary.Value(tag=tag, image=image)]))

    def layout(self, categories: Mapping[str, Mapping[str, Sequence[str]]]) -> None:
        """What the dashboard of custom scalars shows: category -> chart -> regular expressions of tags."""
        from tensorboard.plugins.custom_scalar import layout_pb2, metadata

        made = layout_pb2.Layout(
            category=[
                layout_pb2.Category(
                    title=title,
                    chart=[
                        layout_pb2.Chart(title=name, multiline=layout_pb2.MultilineChartContent(tag=tags))
                        for name, tags in charts.items()
                    ],
                )
                for title, charts in categories.items()
            ]
        )
        self._tensor(0, metadata.CONFIG_SUMMARY_TAG, metadata.create_summary_metadata(), made.SerializeToString())

    def hyperparameters(self, values: Mapping[str, Value], metrics: Sequence[str]) -> None:
        """The settings of a run, for the table of TensorBoard's HParams; ``metrics``: tags of scalars of this log."""
        from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2

        kinds = {bool: api_pb2.DATA_TYPE_BOOL, str: api_pb2.DATA_TYPE_STRING}
        infos = [
            api_pb2.HParamInfo(name=name, type=kinds.get(type(value), api_pb2.DATA_TYPE_FLOAT64))
            for name, value in values.items()
        ]
        named = [api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag)) for tag in metrics]
        self._hparams(
            "_hparams_/experiment",
            plugin_data_pb2.HParamsPluginData(experiment=api_pb2.Experiment(hparam_infos=infos, metric_infos=named)),
        )
        start = plugin_data_pb2.SessionStartInfo(start_time_secs=time.time())
        for name, value in values.items():
            kind = {bool: "bool_value", str: "string_value"}.get(type(value), "number_value")
            setattr(start.hparams[name], kind, value)
        self._hparams("_hparams_/session_start_info", plugin_data_pb2.HParamsPluginData(session_start_info=start))
        end = plugin_data_pb2.SessionEndInfo(status=api_pb2.STATUS_SUCCESS, end_time_secs=time.time())
        self._hparams("_hparams_/session_end_info", plugin_data_pb2.HParamsPluginData(session_end_info=end))

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()

    def _hparams(self, tag: str, content: Any) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.hparams import metadata

        content.version = metadata.PLUGIN_DATA_VERSION
        about = metadata.create_summary_metadata(content)
        self._add(0, summary=Summary(value=[Summary.Value(tag=tag, metadata=about, tensor=metadata.NULL_TENSOR)]))

    def _tensor(self, step: int, tag: str, about: Any, content: bytes) -> None:
        """One string, with what says for which dashboard. TensorBoard's own helpers for these want TensorFlow."""
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.util.tensor_util import make_tensor_proto

        value = Summary.Value(tag=tag, metadata=about, tensor=make_tensor_proto(content))
        self._add(step, summary=Summary(value=[value]))

    def _add(self, step: int, **content: Any) -> None:
        self._writer.add_event(self._event(wall_time=time.time(), step=step, **content))


@cache
def _say_once() -> None:
    """Keep TensorBoard's threads from printing a traceback as they die of an error that is raised later, too."""
    otherwise = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        if type(args.thread).__module__ != "tensorboard.summary.writer.event_file_writer":
            otherwise(args)

    threading.excepthook = hook
