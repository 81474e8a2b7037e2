"""Golden cases of the official STAR code."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from stagevar.models.star.text import PromptText
from stagevar.models.star.transformer import STAR, STARConfig
from stagevar.schedule.grids import square
from tests.golden.checks import Check, difference, load_arrays, load_recipe, rand_in
from tests.golden.var_cases import compare, read_shapes


def run_case(json_path: Path) -> list[Check]:
    """All checks of one STAR case, in the reference's literal batch behaviour; of one prompt also in ours."""
    case, arrays = json.loads(json_path.read_text()), load_arrays(json_path)
    c = case["config"]
    batch = c["B"]
    recipe = {
        "text": rand_in("star_text", (2 * batch, 7, c["in_dim_cross"]), 1.0),
        "pool": rand_in("star_pool", (2 * batch, c["in_dim_cross"]), 1.0),
    }
    text = {key: torch.from_numpy(arrays[key]) if key in arrays else value for key, value in recipe.items()}
    text["mask"] = torch.from_numpy(arrays["mask"])
    rows = [
        PromptText(text["text"][i], text["mask"][i], text["pool"][i], text["pool"][batch + i]) for i in range(batch)
    ]
    checks = [difference(f"{key} recipe", recipe[key], text[key].numpy(), 0) for key in recipe]
    for literal in (True, False) if batch == 1 else (True,):
        config = STARConfig(
            depth=c["depth"],
            width=c["embed_dim"],
            heads=c["num_heads"],
            sides=tuple(c["patch_nums"]),
            text_dim=c["in_dim_cross"],
            vocabulary=c["V"],
            code_dim=c["Cvae"],
            rope_theta=c["rope_theta"],
            rope_span=c["rope_norm"],
            literal_cross_rows=literal,
        )
        transformer = STAR(config)
        found = load_recipe(transformer, read_shapes(case["shapes"]))
        transformer.set_grids(square(config.sides))
        for key, table in zip(("freqs_cis_re", "freqs_cis_im"), transformer._rope, strict=True):  # type: ignore[arg-type]
            if key in arrays:
                found.append(difference(key, table, arrays[key], 1e-5))
        found += compare(case, arrays, transformer, rows)
        label = "literal " if literal else ""
        checks += [Check(label + check.name, check.value, check.limit) for check in found]
    return checks
