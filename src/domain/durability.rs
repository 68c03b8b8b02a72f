//! What the settings of the stores are worth: whether an acceptance survives what a sale asks for.
//!
//! Pure, so that every combination of settings can be tried.

use std::{fmt, sync::Arc};

use super::order::{Durability, Mode};

/// The seconds that a replica may be silent before it counts no more. Longer, and the primary would
/// go on taking purchases that nobody else gets.
const REPLICA_LAG_SECONDS: std::ops::RangeInclusive<u32> = 1..=5;

/// Why a mode cannot be given, and what to change.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Lack(pub Arc<str>);

impl Lack {
    /// A lack, in words.
    pub fn new(reason: impl Into<Arc<str>>) -> Self {
        Self(reason.into())
    }
}

/// What the operator says about the Redis server.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Said {
    /// Replicas that must have an acceptance in the mode `replicated`; 0 when there is no such
    /// mode.
    pub replicas: u32,
    /// What Redis' file survives, for a server that does not show its settings: `fast` or `fsync`.
    pub asserted: Option<Durability>,
}

/// Whether Redis writes what it does into a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum File {
    /// No.
    Off,
    /// It was switched on, and nothing in it counts before its first rewriting is done.
    Beginning,
    /// Yes.
    On {
        /// It is being written anew at the moment.
        rewriting: bool,
    },
}

/// What a Redis server says of itself to everybody who may run a script.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RedisSettings {
    /// Its file (`appendonly`).
    pub file: File,
    /// What it drops when memory is full (`maxmemory-policy`).
    pub policy: String,
    /// Replicas that have answered within the permitted lag.
    pub replicas: u32,
    /// What only `CONFIG` says; `None` when the server does not allow it.
    pub config: Option<RedisConfig>,
}

/// What `CONFIG` says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RedisConfig {
    /// `appendfsync`
    pub sync: String,
    /// `no-appendfsync-on-rewrite`
    pub no_sync_on_rewrite: String,
    /// `min-replicas-to-write`
    pub replicas_min: u32,
    /// `min-replicas-max-lag`, in seconds.
    pub lag_max: u32,
}

impl RedisSettings {
    /// The settings as they count, after what was read before.
    ///
    /// A file that has just been switched on is worth nothing until Redis has written the first
    /// whole one: before that a crash comes back with the old one.
    #[must_use]
    pub fn after(mut self, before: Option<&Self>) -> Self {
        let was_on = before.is_none_or(|before| matches!(before.file, File::On { .. }));
        if self.file == (File::On { rewriting: true }) && !was_on {
            self.file = File::Beginning;
        }
        self
    }

    /// Why Redis may drop what it must keep.
    pub fn danger(&self) -> Option<String> {
        (self.policy != "noeviction").then(|| {
            format!(
                "maxmemory-policy is {}, must be noeviction",
                shown(&self.policy)
            )
        })
    }

    /// Whether what it is worth is only what the operator says.
    pub fn unverified(&self) -> bool {
        self.config.is_none()
    }

    /// What an acceptance survives, in a sale that asks for `mode`, as far as Redis is concerned.
    ///
    /// # Errors
    /// [`Lack`]
    pub fn gives(&self, mode: Mode, said: Said) -> Result<Durability, Lack> {
        let file = self.file(said)?;
        match mode {
            Mode::Default => Ok(file),
            Mode::Replicated => self.replicated(said).map(|()| Durability::Replicated),
            Mode::Committed => Ok(Durability::Committed),
        }
    }

    /// What its file survives: without one there is no mode at all.
    fn file(&self, said: Said) -> Result<Durability, Lack> {
        if let Some(danger) = self.danger() {
            return Err(Lack::new(danger));
        }
        match self.file {
            File::Off => return Err(Lack::new("appendonly is no, must be yes")),
            File::Beginning => {
                let reason = "appendonly has just become yes, and the first file is not whole yet";
                return Err(Lack::new(reason));
            }
            File::On { .. } => {}
        }
        let Some(config) = &self.config else {
            return said.asserted.ok_or_else(|| {
                Lack::new(
                    "Redis does not show its settings: allow CONFIG GET, or say what appendfsync is \
                     with STOCKADE_REDIS_DURABILITY",
                )
            });
        };
        if config.no_sync_on_rewrite != "no" {
            return Err(Lack::new(format!(
                "no-appendfsync-on-rewrite is {}, must be no",
                shown(&config.no_sync_on_rewrite)
            )));
        }
        match config.sync.as_str() {
            "always" => Ok(Durability::Fsync),
            "everysec" => Ok(Durability::Fast),
            other => Err(Lack::new(format!(
                "appendfsync is {}, must be always, or everysec for `fast`",
                shown(other)
            ))),
        }
    }

    fn replicated(&self, said: Said) -> Result<(), Lack> {
        let wanted = said.replicas;
        if wanted == 0 {
            return Err(Lack::new(
                "STOCKADE_REPLICAS is 0, must be the number of replicas to wait for",
            ));
        }
        // Without CONFIG, Redis counts replicas only if it watches them at all.
        if let Some(config) = &self.config {
            if config.replicas_min < wanted {
                return Err(Lack::new(format!(
                    "min-replicas-to-write is {}, must be at least {wanted}",
                    config.replicas_min
                )));
            }
            if !REPLICA_LAG_SECONDS.contains(&config.lag_max) {
                return Err(Lack::new(format!(
                    "min-replicas-max-lag is {}, must be {} to {}",
                    config.lag_max,
                    REPLICA_LAG_SECONDS.start(),
                    REPLICA_LAG_SECONDS.end()
                )));
            }
        }
        if self.replicas < wanted {
            return Err(Lack::new(format!(
                "{} replicas follow, {wanted} must",
                self.replicas
            )));
        }
        Ok(())
    }
}

/// One line, as the log shows it.
impl fmt::Display for RedisSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let on = if self.file == File::Off { "no" } else { "yes" };
        write!(f, "appendonly={on} maxmemory-policy={}", self.policy)?;
        match &self.config {
            Some(config) => write!(
                f,
                " appendfsync={} no-appendfsync-on-rewrite={} min-replicas-to-write={} \
                 min-replicas-max-lag={} replicas={}",
                config.sync,
                config.no_sync_on_rewrite,
                config.replicas_min,
                config.lag_max,
                self.replicas
            ),
            None => write!(f, " replicas={} CONFIG not allowed", self.replicas),
        }
    }
}

/// What a PostgreSQL server says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PostgresSettings {
    /// `fsync`
    pub fsync: String,
    /// `full_page_writes`
    pub full_page_writes: String,
    /// `synchronous_commit`, of a session like any other: the writer's own is always on, but epochs
    /// are begun by others.
    pub synchronous_commit: String,
}

impl PostgresSettings {
    /// Whether what it has committed survives a power loss.
    ///
    /// # Errors
    /// [`Lack`]
    pub fn keeps(&self) -> Result<(), Lack> {
        for (name, value) in [
            ("fsync", &self.fsync),
            ("full_page_writes", &self.full_page_writes),
            ("synchronous_commit", &self.synchronous_commit),
        ] {
            if value == "off" {
                return Err(Lack::new(format!("PostgreSQL has {name} off, must be on")));
            }
        }
        Ok(())
    }
}

/// A value of a foreign server, for people: never empty.
fn shown(value: &str) -> &str {
    if value.is_empty() { "unknown" } else { value }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sound() -> RedisSettings {
        RedisSettings {
            file: File::On { rewriting: false },
            policy: "noeviction".to_owned(),
            replicas: 2,
            config: Some(RedisConfig {
                sync: "always".to_owned(),
                no_sync_on_rewrite: "no".to_owned(),
                replicas_min: 2,
                lag_max: 5,
            }),
        }
    }

    fn with(change: impl FnOnce(&mut RedisSettings, &mut RedisConfig)) -> RedisSettings {
        let mut settings = sound();
        let mut config = settings.config.take().unwrap();
        change(&mut settings, &mut config);
        settings.config.get_or_insert(config);
        settings
    }

    const SAID: Said = Said {
        replicas: 2,
        asserted: None,
    };

    #[test]
    fn sound_settings_give_every_mode() {
        for (mode, durability) in [
            (Mode::Default, Durability::Fsync),
            (Mode::Replicated, Durability::Replicated),
            (Mode::Committed, Durability::Committed),
        ] {
            assert_eq!(sound().gives(mode, SAID), Ok(durability));
        }
        let fast = with(|_, config| config.sync = "everysec".to_owned());
        assert_eq!(fast.gives(Mode::Default, SAID), Ok(Durability::Fast));
    }

    #[test]
    fn without_a_file_that_is_synced_there_is_no_mode_at_all() {
        for (settings, says) in [
            (with(|it, _| it.file = File::Off), "appendonly is no"),
            (with(|it, _| it.file = File::Beginning), "not whole yet"),
            (
                with(|_, config| config.sync = "no".to_owned()),
                "appendfsync is no",
            ),
            (
                with(|_, config| config.sync = String::new()),
                "appendfsync is unknown",
            ),
            (
                with(|_, config| config.no_sync_on_rewrite = "yes".to_owned()),
                "no-appendfsync-on-rewrite is yes",
            ),
            (
                with(|it, _| it.policy = "allkeys-lru".to_owned()),
                "maxmemory-policy is allkeys-lru",
            ),
        ] {
            for mode in Mode::ALL {
                let asserted = Some(Durability::Fsync);
                let lack = settings.gives(mode, Said { asserted, ..SAID }).unwrap_err();
                assert!(lack.to_string().contains(says), "{mode:?}: {lack}");
            }
        }
    }

    #[test]
    fn replicated_needs_a_primary_that_refuses_without_its_replicas() {
        for (settings, replicas, says) in [
            (sound(), 0, "STOCKADE_REPLICAS is 0"),
            (sound(), 3, "min-replicas-to-write is 2"),
            (
                with(|_, config| config.lag_max = 6),
                2,
                "min-replicas-max-lag is 6",
            ),
            (
                with(|_, config| config.lag_max = 0),
                2,
                "min-replicas-max-lag is 0",
            ),
            (with(|it, _| it.replicas = 1), 2, "1 replicas follow"),
        ] {
            let said = Said { replicas, ..SAID };
            let lack = settings.gives(Mode::Replicated, said).unwrap_err();
            assert!(lack.to_string().contains(says), "{lack}");
            assert!(settings.gives(Mode::Default, said).is_ok());
            assert!(settings.gives(Mode::Committed, said).is_ok());
        }
    }

    #[test]
    fn what_redis_does_not_show_must_be_said() {
        let silent = RedisSettings {
            config: None,
            ..sound()
        };
        assert!(silent.unverified());
        for mode in Mode::ALL {
            let lack = silent.gives(mode, SAID).unwrap_err();
            assert!(lack.to_string().contains("STOCKADE_REDIS_DURABILITY"));
        }
        for asserted in [Durability::Fast, Durability::Fsync] {
            let said = Said {
                asserted: Some(asserted),
                ..SAID
            };
            assert_eq!(silent.gives(Mode::Default, said), Ok(asserted));
            assert!(silent.gives(Mode::Replicated, said).is_ok());
            // What can be seen is believed, whatever is said.
            let off = RedisSettings {
                file: File::Off,
                ..silent.clone()
            };
            assert!(off.gives(Mode::Default, said).is_err());
        }
        // What Redis shows counts more than what is said.
        let said = Said {
            asserted: Some(Durability::Fsync),
            ..SAID
        };
        let fast = with(|_, config| config.sync = "everysec".to_owned());
        assert_eq!(fast.gives(Mode::Default, said), Ok(Durability::Fast));
    }

    #[test]
    fn a_file_that_was_switched_on_counts_once_it_is_whole() {
        let reading = |file| RedisSettings { file, ..sound() };
        let (off, on) = (reading(File::Off), reading(File::On { rewriting: false }));
        let rewriting = reading(File::On { rewriting: true });
        assert_eq!(rewriting.clone().after(None), rewriting);
        assert_eq!(rewriting.clone().after(Some(&on)), rewriting);
        let beginning = rewriting.clone().after(Some(&off));
        assert_eq!(beginning.file, File::Beginning);
        assert_eq!(
            rewriting.clone().after(Some(&beginning)).file,
            File::Beginning
        );
        assert_eq!(on.clone().after(Some(&beginning)), on);
    }

    #[test]
    fn a_postgresql_that_does_not_sync_keeps_nothing() {
        let sound = PostgresSettings {
            fsync: "on".to_owned(),
            full_page_writes: "on".to_owned(),
            synchronous_commit: "remote_apply".to_owned(),
        };
        assert_eq!(sound.keeps(), Ok(()));
        let off = || "off".to_owned();
        for (settings, says) in [
            (
                PostgresSettings {
                    fsync: off(),
                    ..sound.clone()
                },
                "fsync off",
            ),
            (
                PostgresSettings {
                    full_page_writes: off(),
                    ..sound.clone()
                },
                "full_page_writes off",
            ),
            (
                PostgresSettings {
                    synchronous_commit: off(),
                    ..sound
                },
                "synchronous_commit off",
            ),
        ] {
            assert!(settings.keeps().unwrap_err().to_string().contains(says));
        }
    }
}
