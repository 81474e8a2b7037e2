"""The report's sections below its headline, a file each: functions from a StudyResult to HTML, empty for no section."""
