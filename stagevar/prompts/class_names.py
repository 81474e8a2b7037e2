"""Names of object classes and colors as detectors, people and benchmarks spell them, brought to GenEval's spelling."""

from __future__ import annotations

import functools
import re

#: What detectors and data sets (COCO, Pascal VOC, Objects365) call the classes that GenEval names differently.
ALIASES = {
    "mouse": "computer mouse",
    "remote": "tv remote",
    "remote control": "tv remote",
    "keyboard": "computer keyboard",
    "tvmonitor": "tv",
    "tv monitor": "tv",
    "television": "tv",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "motorbike": "motorcycle",
    "aeroplane": "airplane",
    "hair dryer": "hair drier",
    "hairdryer": "hair drier",
    "cellphone": "cell phone",
    "mobile phone": "cell phone",
    "doughnut": "donut",
    "hotdog": "hot dog",
    "teddybear": "teddy bear",
    "trafficlight": "traffic light",
    "stopsign": "stop sign",
    "wineglass": "wine glass",
}


@functools.lru_cache(maxsize=4096)
def class_name(label: str) -> str:
    """GenEval's wording of a class: small letters, single spaces, known aliases replaced; an unknown name keeps its words."""
    words = _words(label)
    return ALIASES.get(words, words)


@functools.lru_cache(maxsize=4096)
def color_name(label: str) -> str:
    """A color in small letters."""
    return _words(label)


def _words(label: str) -> str:
    return re.sub(r"[\s_-]+", " ", label.casefold()).strip()
