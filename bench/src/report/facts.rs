//! What a document says of where it was made: the machine, the versions, the command.

use std::env;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;

use rustix::system::uname;

use super::document::{Machine, Versions};

/// The commit of a build that has no work tree around it, such as one in a container.
const BUILT_FROM: Option<&str> = option_env!("STOCKADE_COMMIT");

impl Machine {
    /// This one, now.
    pub(crate) fn here() -> Self {
        let file = |path| fs::read_to_string(path).unwrap_or_default();
        let uname = uname();
        let kernel = [uname.sysname(), uname.release(), uname.machine()]
            .map(|part| part.to_string_lossy().into_owned());
        let load = file("/proc/loadavg");
        Self {
            cpu: cpu(&file("/proc/cpuinfo")),
            cores: thread::available_parallelism().map_or(1, usize::from),
            memory_bytes: memory_bytes(&file("/proc/meminfo"), "MemTotal:").unwrap_or(0),
            kernel: kernel.join(" "),
            load_before: load.split(' ').next().and_then(|load| load.parse().ok()),
        }
    }
}

impl Versions {
    /// The harness' own; those of the services are added by who knows them.
    pub(crate) fn here() -> Self {
        let stockade = env!("CARGO_PKG_VERSION").to_owned();
        // The sources that it was built from, if they are still there.
        let tree = Path::new(env!("CARGO_MANIFEST_DIR"));
        match git(tree, &["rev-parse", "HEAD"]) {
            Some(commit) => Self {
                stockade,
                commit: Some(commit),
                dirty: git(tree, &["status", "--porcelain"])
                    .is_some_and(|changes| !changes.is_empty()),
                ..Self::default()
            },
            None => Self {
                stockade,
                commit: BUILT_FROM.map(str::to_owned),
                ..Self::default()
            },
        }
    }
}

/// The command line that this process was started with, quoted for a shell.
pub(crate) fn command() -> String {
    let mut words = env::args();
    // Where the binary lies says nothing.
    let name = words.next().unwrap_or_default();
    let name = name.rsplit('/').next().unwrap_or_default().to_owned();
    let words: Vec<String> = [name].into_iter().chain(words).collect();
    words
        .iter()
        .map(|word| quoted(word))
        .collect::<Vec<_>>()
        .join(" ")
}

fn quoted(word: &str) -> String {
    let is_plain = |char: char| char.is_ascii_alphanumeric() || "-_./:=,@%+".contains(char);
    if !word.is_empty() && word.chars().all(is_plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

/// What git says of a work tree, if there are both.
fn git(tree: &Path, arguments: &[&str]) -> Option<String> {
    let output = Command::new("git")
        .arg("-C")
        .arg(tree)
        .args(arguments)
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
        .ok()?;
    let said = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| said.trim().to_owned())
}

/// The model of the first processor.
fn cpu(cpuinfo: &str) -> String {
    let model = cpuinfo
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    model
        .map_or("unknown", |(_, model)| model.trim())
        .to_owned()
}

/// A line of the kernel's account of memory, by its name.
pub(crate) fn memory_bytes(meminfo: &str, name: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix(name))?;
    let kib: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_files_are_read() {
        let cpuinfo = "processor\t: 0\nmodel name\t: A CPU @ 2.0GHz\n\nmodel name\t: Another\n";
        assert_eq!(cpu(cpuinfo), "A CPU @ 2.0GHz");
        assert_eq!(cpu("processor: 0"), "unknown");
        assert_eq!(
            memory_bytes("MemTotal:        8000 kB\nMemFree: 1 kB\n", "MemTotal:"),
            Some(8_192_000)
        );
        assert_eq!(memory_bytes("MemFree: 1 kB\n", "MemTotal:"), None);
    }

    #[test]
    fn a_command_line_can_be_pasted_into_a_shell() {
        assert_eq!(quoted("--rate"), "--rate");
        assert_eq!(quoted("2000/s"), "2000/s");
        assert_eq!(quoted("p99_ms <= 500"), "'p99_ms <= 500'");
        assert_eq!(quoted("it's"), r"'it'\''s'");
        assert_eq!(quoted(""), "''");
    }

    #[test]
    fn this_machine_is_known() {
        let machine = Machine::here();
        assert!(machine.cores > 0 && machine.memory_bytes > 0);
        assert!(machine.kernel.starts_with("Linux "), "{machine:?}");
    }
}
