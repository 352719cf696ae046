"""Comparisons of golden directories of GLaMM: `context` opens one, `cases_*` compare, `registry` says which file goes
where, `backend` and `backend_onnx` are what is checked."""
