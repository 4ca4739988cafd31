"""How a model behaves when sensors fail: conditions -> masks -> ranks of the true classes -> rows -> report."""
