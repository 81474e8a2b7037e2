"""`stagevar`: its commands and the console that all three commands of the project share."""
