# Rivals beside ours, in an environment of their own.
RIVALS := .venv-rivals

.PHONY: rivals bench-rivals

$(STAMPS)/rivals: $(STAMPS)/package tests/benchmarks/rivals.mk
	@echo "installing NIXL 1.5.1 (about 60 MB, carries UCX), uvloop and aiotransfer into $(RIVALS)"
	@$$(cat $(STAMPS)/python) -m venv $(RIVALS)
	@$(RIVALS)/bin/pip --disable-pip-version-check install --quiet --editable . uvloop==0.23.0
	@$(RIVALS)/bin/pip --disable-pip-version-check install --quiet --no-deps nixl-cu12==1.5.1
	@touch $@

rivals: $(STAMPS)/rivals

bench-rivals: $(STAMPS)/rivals
	@$(RIVALS)/bin/python tests/benchmarks/rivals.py $(ARGS)
