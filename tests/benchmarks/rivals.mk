# Rivals beside ours, each in an environment of its own. One that does not install leaves its reason in a file named why.
RIVALS := .venv-rivals

.PHONY: rivals bench-rivals

$(STAMPS)/rivals: $(STAMPS)/package tests/benchmarks/rivals.mk tests/benchmarks/install_rivals.sh
	@bash tests/benchmarks/install_rivals.sh $(RIVALS) "$$(cat $(STAMPS)/python)"
	@touch $@

rivals: $(STAMPS)/rivals ## bench: installs NIXL, UCX and others | not measured

bench-rivals: $(STAMPS)/rivals ## bench: NIXL, UCX and others in the same loop | not measured
	@$(RIVALS)/ours/bin/python tests/benchmarks/rivals/compare.py $(ARGS)
