import numpy as np

from aiotransfer.weights import Cast, Layout, PlanError, Tensor, fused, make_plan, sharded

q, k = Tensor("wq", (64, 32), "float32"), Tensor("wk", (16, 32), "float32")
trainer = Layout([q, k], [*sharded(q, range(3)), *sharded(k, range(3))], ranks=3)  # FSDP: 22, 22 and 20 rows of 64

q16, k16 = Tensor("wq", (64, 32), "bfloat16"), Tensor("wk", (16, 32), "bfloat16")
inference = Layout([q16, k16], fused("qk", [q16, k16], range(2)), ranks=2)  # rank r holds [q_r; k_r] in its buffer "qk"
try:
    make_plan(trainer, inference)
except PlanError as error:
    print(error)

plan = make_plan(trainer, {"first": inference, "second": inference}, [Cast("w{x}")], fanout="relay")
print(plan.explain())

tasks = plan.tasks(0)  # what trainer rank 0 does
print(len(tasks.job), "jobs,", len(list(tasks.writes.calls())), "calls,", int(tasks.writes.nbytes.sum()), "bytes")
print(int(plan.expected("first", 1).nbytes.sum()), "bytes make rank 1 whole")

bound = inference.bind(0, {"qk": np.zeros((40, 32), np.uint16)})
print(bound.moved())
