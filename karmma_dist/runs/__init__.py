"""Run folders: their files, their processes, their listing."""
