"""What a study deploys: the profile's file, the pipeline that draws with it, and the checks of the machine that does."""

from pathlib import Path

from stagevar.profile.envelope import Envelope, card_section, present_envelope
from stagevar.profile.profile import SCHEMA, SECTIONS, Profile
from stagevar.profile.step_data import StepData, steps_to_data
from stagevar.sections import plain

#: What editors complete and check a profile.yaml by (stagevar.profile.json_schema makes it).
PROFILE_JSON_SCHEMA = Path(__file__).resolve().parents[1] / "data" / "profile.schema.json"

__all__ = [
    "PROFILE_JSON_SCHEMA",
    "SCHEMA",
    "SECTIONS",
    "Envelope",
    "Profile",
    "StepData",
    "card_section",
    "plain",
    "present_envelope",
    "steps_to_data",
]
