"""The diagnosis of a machine: hardware, software, disks, and the needs of a recipe."""
