//! Fail points and seeded bugs, for builds that prove the tests. Without the feature `faults`, which
//! no build for use has, all of it compiles to nothing.
//!
//! `STOCKADE_FAIL_POINT=name[:nth[:verb]]` names a point at which the process ends as by SIGKILL,
//! nothing tidied up; `nth` is the first time (1, the default) or a later one. With the verb `stall`
//! it stops there as by SIGSTOP, and goes on after SIGCONT.
//!
//! `STOCKADE_BUG=name` switches one bug on. `tests/mutants.txt` lists them all, each with the test
//! that must notice it.

pub use self::imp::{ENABLED, VARIABLES, bug, point, script};

#[cfg(not(feature = "faults"))]
mod imp {
    /// Whether this is a test build.
    pub const ENABLED: bool = false;

    /// The variables that mean something here: none.
    pub const VARIABLES: [&str; 0] = [];

    /// A place where a test build may end or stop.
    #[inline]
    pub const fn point(_name: &str) {}

    /// Whether the bug is switched on: never.
    #[inline]
    pub const fn bug(_name: &str) -> bool {
        false
    }

    /// The text of a script as Redis gets it.
    #[inline]
    pub const fn script(_name: &str, text: &'static str) -> &'static str {
        text
    }
}

#[cfg(feature = "faults")]
#[allow(
    clippy::panic,
    clippy::unwrap_used,
    reason = "a test build that cannot do as it is told must not look as if it did"
)]
mod imp {
    use std::{
        env,
        sync::{
            OnceLock,
            atomic::{AtomicU64, Ordering},
        },
    };

    use rustix::process::{Signal, getpid, kill_process};

    /// Whether this is a test build.
    pub const ENABLED: bool = true;

    /// The variables that mean something here.
    pub const VARIABLES: [&str; 2] = [FAIL_POINT, BUG];

    const FAIL_POINT: &str = "STOCKADE_FAIL_POINT";
    const BUG: &str = "STOCKADE_BUG";

    /// The armed fail point, and the times that are left before it acts.
    struct Armed {
        name: String,
        left: AtomicU64,
        signal: Signal,
    }

    fn armed() -> Option<&'static Armed> {
        static ARMED: OnceLock<Option<Armed>> = OnceLock::new();
        let armed = ARMED.get_or_init(|| {
            let text = env::var(FAIL_POINT).ok()?;
            let mut parts = text.split(':');
            let name = parts.next().unwrap_or_default().to_owned();
            let nth = parts.next().map_or(Ok(1), str::parse);
            let signal = match parts.next() {
                None | Some("kill") => Some(Signal::KILL),
                Some("stall") => Some(Signal::STOP),
                Some(_) => None,
            };
            let (Ok(nth @ 1..), Some(signal)) = (nth, signal) else {
                panic!("{FAIL_POINT}={text}: want name[:nth[:kill|stall]]");
            };
            Some(Armed {
                name,
                left: AtomicU64::new(nth),
                signal,
            })
        });
        armed.as_ref()
    }

    /// Ends or stops the process here, if the environment says so and it is the nth time.
    ///
    /// # Panics
    /// When the variable cannot be read.
    pub fn point(name: &str) {
        let Some(armed) = armed().filter(|armed| armed.name == name) else {
            return;
        };
        // Past its time the count wraps around; it is not zero again within a test.
        if armed.left.fetch_sub(1, Ordering::SeqCst) == 1 {
            kill_process(getpid(), armed.signal).unwrap();
        }
    }

    /// Whether the bug is switched on.
    pub fn bug(name: &str) -> bool {
        static SWITCHED_ON: OnceLock<Option<String>> = OnceLock::new();
        SWITCHED_ON.get_or_init(|| env::var(BUG).ok()).as_deref() == Some(name)
    }

    /// Bugs of scripts: name, the scripts it is in (none: all), and lines as they are and as the bug
    /// has them, all from the first word on.
    type Patch = (
        &'static str,
        &'static [&'static str],
        &'static [(&'static str, &'static str)],
    );

    const PATCHES: &[Patch] = &[
        (
            "read_then_write",
            &["purchase"],
            &[
                (
                    "if remaining == 0 or round.n_line > 0 and redeems[i] == 0 then",
                    "round.before = round.before or remaining; if round.before == 0 then",
                ),
                (
                    "elseif remaining < quantity then",
                    "elseif round.before < quantity then",
                ),
            ],
        ),
        (
            "limit_after_decrement",
            &["purchase"],
            &[(
                "if units + quantity > round.buyer_limit",
                "if units > round.buyer_limit",
            )],
        ),
        (
            "limit_not_running",
            &["purchase"],
            &[(
                "members.units[buyer], members.acceptances[buyer] = units + quantity, acceptances + 1",
                "members.units[buyer], members.acceptances[buyer] = units, acceptances + 1",
            )],
        ),
        (
            "journal_maxlen",
            &["purchase", "release", "allocate", "control", "provision"],
            &[(
                "local id = redis.pcall('XADD', KEYS[2], 'NOMKSTREAM', whole(partition.epoch) .. '-' .. whole(pseq),",
                "local id = redis.pcall('XADD', KEYS[2], 'NOMKSTREAM', 'MAXLEN', '=', '2', whole(partition.epoch) .. '-' .. whole(pseq),",
            )],
        ),
        (
            "journal_failure_ignored",
            &["purchase"],
            &[("return { 'fenced', 'journal' }", "local _ = 0")],
        ),
        (
            "score_is_time",
            &["purchase"],
            &[(
                "places[at + 1], places[at + 2] = seq, id",
                "places[at + 1], places[at + 2] = partition.now_ms, id",
            )],
        ),
        (
            "application_clock",
            &[],
            &[(
                "now_ms = math.max(now_ms, tonumber(meta[4]))",
                "now_ms = expected_ms",
            )],
        ),
        (
            "clock_goes_back",
            &[],
            &[("now_ms = math.max(now_ms, tonumber(meta[4]))", "")],
        ),
        (
            "key_not_stored",
            &["purchase"],
            &[("redis.call('HSET', sale.orders_key, unpack(sale.new))", "")],
        ),
        (
            "key_not_checked",
            &["purchase"],
            &[("if record then", "if false then")],
        ),
        (
            "fingerprint_not_checked",
            &["purchase"],
            &[("if sub(record, -24) == request then", "if record then")],
        ),
        (
            "no_epoch_fence",
            &[],
            &[("if tonumber(meta[1]) ~= epoch then", "if false then")],
        ),
        (
            "no_incarnation_fence",
            &[],
            &[("if meta[2] ~= replid then", "if false then")],
        ),
        (
            "no_floor",
            &[],
            &[("if pseq < floor then", "if false then")],
        ),
        (
            "clock_jump_believed",
            &[],
            &[(
                "if now_ms < expected_ms - CLOCK_JUMP_MS then",
                "if false then",
            )],
        ),
        (
            "deadline_ignored",
            &[],
            &[("if now_ms > not_after_ms then", "if false then")],
        ),
        (
            "counts_of_round_unchecked",
            &["purchase"],
            &[(
                "elseif not intact(round, KEYS[base + 1], KEYS[base + 2], KEYS[base + 3]) then",
                "elseif false then",
            )],
        ),
        (
            "counts_of_sale_unchecked",
            &["purchase"],
            &[(
                "sale.intact = has_orders(sale, orders_key)",
                "sale.intact = true",
            )],
        ),
        (
            "lost_round_made_anew",
            &["provision"],
            &[(
                "if redis.call('EXISTS', KEYS[4], KEYS[5], KEYS[6], KEYS[7], KEYS[8]) > 0 then",
                "if false then",
            )],
        ),
        (
            "archive_not_asked",
            &["purchase"],
            &[(
                "if archives[i] < sale.archived_rounds then",
                "if false then",
            )],
        ),
        (
            "settled_gives_back",
            &["release"],
            &[("elseif settled then", "elseif false then")],
        ),
        (
            "settled_while_open",
            &["settle"],
            &[(
                "elseif state_of(round, partition.now_ms) ~= 'closed' then",
                "elseif false then",
            )],
        ),
        (
            "archived_unsettled",
            &["archive"],
            &[(
                "if round.intent ~= 'settled' and round.intent ~= 'archived' then",
                "if false then",
            )],
        ),
        (
            "trimmed_past_position",
            &["trim"],
            &[(
                "if pseq <= position and at_ms and at_ms < before_ms then",
                "if at_ms and at_ms < before_ms then",
            )],
        ),
        (
            "trimmed_too_young",
            &["trim"],
            &[(
                "if pseq <= position and at_ms and at_ms < before_ms then",
                "if pseq <= position then",
            )],
        ),
        (
            "release_twice",
            &["release"],
            &[(
                "elseif order.status ~= STATUS.confirmed and order.status ~= STATUS.held then",
                "elseif false then",
            )],
        ),
        (
            "cancel_keeps_board_entry",
            &["release"],
            &[("call_with('ZREM', KEYS[5], change.off_board)", "")],
        ),
        (
            "cancel_keeps_units_of_buyer",
            &["release"],
            &[("who.units, who.changed = who.units - units, true", "")],
        ),
        (
            "insufficient_told_as_sold_out",
            &["purchase"],
            &[(
                "return 'insufficient', whole(remaining)",
                "return 'sold_out', ''",
            )],
        ),
        (
            "end_inclusive",
            &[],
            &[(
                "if OVER[round.intent] or (round.closes_ms > 0 and now_ms >= round.closes_ms) then",
                "if OVER[round.intent] or (round.closes_ms > 0 and now_ms > round.closes_ms) then",
            )],
        ),
        (
            "start_exclusive",
            &[],
            &[(
                "elseif now_ms < round.opens_ms then",
                "elseif now_ms <= round.opens_ms then",
            )],
        ),
        (
            "grace_ignored",
            &[],
            &[(
                "elseif round.intent == 'paused' or now_ms < round.grace_ms then",
                "elseif round.intent == 'paused' then",
            )],
        ),
        (
            "redeem_ignores_limit",
            &["purchase"],
            &[(
                "if units + quantity > round.buyer_limit",
                "if redeems[i] == 0 and units + quantity > round.buyer_limit",
            )],
        ),
        (
            "redeem_ignores_stock",
            &["purchase"],
            &[
                (
                    "if remaining == 0 or round.n_line > 0 and redeems[i] == 0 then",
                    "if (remaining == 0 or round.n_line > 0) and redeems[i] == 0 then",
                ),
                (
                    "elseif remaining < quantity then",
                    "elseif remaining < quantity and redeems[i] == 0 then",
                ),
            ],
        ),
        (
            "redeem_stops_with_the_sale",
            &["purchase"],
            &[(
                "elseif round.state ~= 'open' and not (redeems[i] == 1 and REDEEMS[round.intent]) then",
                "elseif round.state ~= 'open' then",
            )],
        ),
        (
            "everybody_redeems",
            &["purchase"],
            &[(
                "elseif round.state ~= 'open' and not (redeems[i] == 1 and REDEEMS[round.intent]) then",
                "elseif round.state ~= 'open' and not REDEEMS[round.intent] then",
            )],
        ),
        (
            "key_of_receipt_not_kept",
            &["purchase"],
            &[(
                "receipt_key, round.number, partition.epoch)",
                "0, round.number, partition.epoch)",
            )],
        ),
        (
            "restock_not_idempotent",
            &["allocate"],
            &[("if known then", "if false then")],
        ),
        (
            "release_not_idempotent",
            &["release"],
            &[("if known then", "if false then")],
        ),
        (
            "paid_too_late",
            &["confirm"],
            &[(
                "elseif change.partition.now_ms >= order.until_ms then",
                "elseif false then",
            )],
        ),
        (
            "hold_stays_after_its_end",
            &["confirm", "release", "sweep"],
            &[("call_with('ZREM', KEYS[6], change.off_hold)", "")],
        ),
        (
            "expired_units_stay_held",
            &["sweep"],
            &[(
                "round[place] = round[place] - units",
                "round.sold = round.sold - 0",
            )],
        ),
        (
            "extended_for_ever",
            &["extend"],
            &[("elseif order.extended_ms > 0 then", "elseif false then")],
        ),
        (
            "line_jumped",
            &["purchase"],
            &[(
                "if remaining == 0 or round.n_line > 0 and redeems[i] == 0 then",
                "if remaining == 0 then",
            )],
        ),
        (
            "line_from_its_end",
            &["sweep", "release", "allocate"],
            &[(
                "local buyers = redis.call('ZRANGE', KEYS[7], 0, most - 1)",
                "local buyers = redis.call('ZREVRANGE', KEYS[7], 0, most - 1)",
            )],
        ),
        (
            "cart_in_parts",
            &["purchase"],
            &[("if refused then", "if false then")],
        ),
        (
            "limit_over_sale_forgotten",
            &["purchase"],
            &[(
                "if has(round.policy, LIMIT_OVER_SALE) then",
                "if false then",
            )],
        ),
        (
            "sold_out_stays_open",
            &[],
            &[(
                "return has(round.policy, ENDS_SOLD_OUT) and round.remaining == 0 and round.held == 0",
                "return false and round.remaining == 0 and round.held == 0",
            )],
        ),
        (
            "open_round_amended",
            &["amend"],
            &[(
                "elseif state ~= 'scheduled' and not end_only then",
                "elseif false then",
            )],
        ),
    ];

    /// The text of a script as Redis gets it: with the bug, if it is in this one.
    ///
    /// # Panics
    /// When a line that the bug is made from is not there exactly once any more.
    pub fn script(name: &str, text: &'static str) -> &'static str {
        let is_here =
            |patch: &&Patch| bug(patch.0) && (patch.1.is_empty() || patch.1.contains(&name));
        match PATCHES.iter().find(is_here) {
            Some(patch) => Box::leak(patched(patch, text).into_boxed_str()),
            None => text,
        }
    }

    fn patched((bug, _, lines): &Patch, text: &str) -> String {
        let mut text: Vec<String> = text.lines().map(str::to_owned).collect();
        for (right, wrong) in *lines {
            let mut found: Vec<_> = text
                .iter_mut()
                .filter(|line| line.trim_start() == *right)
                .collect();
            match found.as_mut_slice() {
                [line] => (*wrong).clone_into(line),
                found => panic!("bug {bug}: {} lines {right:?}, want one", found.len()),
            }
        }
        text.join("\n") + "\n"
    }

    #[cfg(test)]
    mod tests {
        use std::{fs, path::Path};

        use super::*;

        /// The scripts that every bug is looked for in, with the shared parts.
        fn text(script: &str) -> String {
            let lua = Path::new(env!("CARGO_MANIFEST_DIR")).join("lua");
            let read = |part: &str| fs::read_to_string(lua.join(format!("{part}.lua"))).unwrap();
            let mut text = ["shared/partition", "shared/round", "shared/journal"]
                .map(read)
                .concat();
            let own = read(script);
            if own.contains("open_change(") {
                text += &read("shared/change");
            }
            text + &own
        }

        #[test]
        fn every_bug_fits_its_scripts_and_is_listed() {
            let listed = include_str!("../tests/mutants.txt");
            for patch in PATCHES {
                let scripts = if patch.1.is_empty() {
                    &["purchase"]
                } else {
                    patch.1
                };
                for script in scripts {
                    let right = text(script);
                    assert_ne!(patched(patch, &right), right);
                }
                let is_listed = |line: &str| line.split_whitespace().next() == Some(patch.0);
                assert!(listed.lines().any(is_listed), "{} is not listed", patch.0);
            }
        }
    }
}
