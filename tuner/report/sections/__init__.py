"""The sections of the report below its headline, a file each: functions from a StudyResult to HTML (empty: left out)."""
