//! The scripts: their text, joined at compile time, and their names inside Redis.

use sha1::{Digest, Sha1};

use crate::faults;

/// A script, ready to be called by its hash.
#[derive(Debug)]
pub(super) struct Script {
    /// The operation, for messages and metrics.
    pub(super) name: &'static str,
    /// The text.
    pub(super) text: &'static str,
    /// Its SHA-1 in hex.
    pub(super) sha: String,
}

impl Script {
    fn new(name: &'static str, text: &'static str) -> Self {
        let text = faults::script(name, text);
        let sha = Sha1::digest(text.as_bytes())
            .iter()
            .fold(String::new(), |mut hex, byte| {
                use std::fmt::Write;
                let _ = write!(hex, "{byte:02x}");
                hex
            });
        Self { name, text, sha }
    }
}

/// Joins the flags, the shared fragments and the script.
macro_rules! script {
    ($flags:literal, $name:literal $(, $more:literal)?) => {
        Script::new(
            $name,
            concat!(
                "#!lua",
                $flags,
                "\n",
                include_str!("../../lua/shared/partition.lua"),
                include_str!("../../lua/shared/round.lua"),
                include_str!("../../lua/shared/journal.lua"),
                $(include_str!(concat!("../../lua/shared/", $more, ".lua")),)?
                include_str!(concat!("../../lua/", $name, ".lua")),
            ),
        )
    };
}

/// All scripts.
#[derive(Debug)]
pub(super) struct Scripts {
    pub(super) allocate: Script,
    pub(super) amend: Script,
    pub(super) archive: Script,
    pub(super) audit: Script,
    pub(super) condemn: Script,
    pub(super) confirm: Script,
    pub(super) control: Script,
    pub(super) extend: Script,
    pub(super) inspect: Script,
    pub(super) install: Script,
    pub(super) join: Script,
    pub(super) journal: Script,
    pub(super) leaderboard: Script,
    pub(super) leave: Script,
    pub(super) load: Script,
    pub(super) order: Script,
    pub(super) place: Script,
    pub(super) provision: Script,
    pub(super) purchase: Script,
    pub(super) rebuild: Script,
    pub(super) release: Script,
    pub(super) settle: Script,
    pub(super) snapshot: Script,
    pub(super) sweep: Script,
    pub(super) trim: Script,
    pub(super) whole: Script,
}

impl Script {
    /// The only one that does not run where anything is sold.
    pub(super) fn limit() -> Self {
        let text = concat!("#!lua\n", include_str!("../../lua/limit.lua"));
        Self::new("limit", text)
    }
}

impl Scripts {
    pub(super) fn new() -> Self {
        Self {
            allocate: script!("", "allocate", "change"),
            amend: script!("", "amend", "change"),
            archive: script!(" flags=allow-oom", "archive"),
            audit: script!(" flags=no-writes", "audit"),
            condemn: script!(" flags=allow-oom", "condemn"),
            confirm: script!(" flags=allow-oom", "confirm", "change"),
            control: script!(" flags=allow-oom", "control"),
            extend: script!(" flags=allow-oom", "extend", "change"),
            inspect: script!(" flags=no-writes", "inspect"),
            install: script!("", "install"),
            join: script!("", "join", "change"),
            journal: script!(" flags=no-writes", "journal"),
            leaderboard: script!(" flags=no-writes", "leaderboard"),
            leave: script!(" flags=allow-oom", "leave", "change"),
            load: script!("", "load"),
            order: script!(" flags=no-writes", "order"),
            place: script!(" flags=no-writes", "place", "change"),
            provision: script!("", "provision"),
            purchase: script!("", "purchase"),
            rebuild: script!("", "rebuild"),
            release: script!(" flags=allow-oom", "release", "change"),
            settle: script!(" flags=allow-oom", "settle"),
            snapshot: script!(" flags=no-writes", "snapshot"),
            sweep: script!(" flags=allow-oom", "sweep", "change"),
            trim: script!(" flags=allow-oom", "trim"),
            whole: script!(" flags=no-writes", "whole"),
        }
    }
}
