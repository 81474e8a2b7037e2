"""Draws with a profile in a serving process: load once, warm up, then answer.

python examples/deploy.py outputs/demo/profile.yaml "a photo of a red circle" circle.png
"""

import sys
import time

from stagevar import Profile


def main(profile_path: str, prompt: str, path: str) -> None:
    """Writes one image and says what its profile claims."""
    profile = Profile.load(profile_path)
    print(profile.verdict)
    pipeline = profile.pipeline()
    pipeline.generate([prompt], seeds=[0])  # pays for loading, autotuning and recording once
    began = time.perf_counter()
    [image] = pipeline.generate([prompt], seeds=[1])
    print(f"{1e3 * (time.perf_counter() - began):.0f} ms")
    image.save(path)


if __name__ == "__main__":
    main(*sys.argv[1:4])
