"""karmma-dist: egocentric action recognition that survives missing modalities (KARMMA, arXiv 2504.08578).

Data moves left to right, and a package imports only from those to its left:
packing -> shards -> streaming -> models -> training -> evaluation.
"""

__version__ = "0.2.0"
