# Each target is one line over tools/dev.py, which also works without make: py -3.11 tools/dev.py book
PYTHON ?= python3

.PHONY: book run experiments bench lab test test-full clean
book:        ; $(PYTHON) tools/dev.py book
run:         ; $(PYTHON) tools/dev.py run $(CHAPTERS)
experiments: ; $(PYTHON) tools/dev.py experiments $(EXPERIMENTS)
bench:       ; $(PYTHON) tools/dev.py bench
lab:         ; $(PYTHON) tools/dev.py lab
test:        ; $(PYTHON) tools/dev.py test
test-full:   ; $(PYTHON) tools/dev.py test-full
clean:       ; rm -rf _build
