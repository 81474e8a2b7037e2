"""What a study deploys: the profile's file, the pipeline that draws with it, and the checks of the machine that does."""

from stagevar.profile.envelope import Envelope, card_section, present_envelope
from stagevar.profile.profile import SCHEMA, SECTIONS, Profile, plain, steps_to_data

__all__ = [
    "SCHEMA",
    "SECTIONS",
    "Envelope",
    "Profile",
    "card_section",
    "plain",
    "present_envelope",
    "steps_to_data",
]
