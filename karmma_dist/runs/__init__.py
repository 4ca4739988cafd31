"""Run folders: their files, the processes that write them, and their listing."""
