//! Configuration: environment over TOML file over defaults, checked before anything starts.
//!
//! Keys are declared in [`keys`](self::KEYS) and nowhere else. An unknown key is an error, because a
//! misspelt limit that is silently ignored is found during the sale.

mod endpoints;
mod keys;
mod values;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use email_address::EmailAddress;
use figment::providers::{Format, Toml};
use figment::value::{Dict, Map, Value};
use figment::{Figment, Metadata, Profile, Provider};
use secrecy::ExposeSecret;
use tracing_subscriber::EnvFilter;

use crate::faults;

pub use endpoints::Endpoints;
pub use keys::{Config, KEYS, Key};
pub use values::{AccessLog, LogFormat, Networks, Origins, RateLimit, RedisDurability, Switch};

use crate::domain::{durability::Said, order::Durability, receipt::ReceiptKeys, sealed::DataKeys};

/// The environment variable that names the optional TOML file.
pub const FILE_ENV: &str = "STOCKADE_CONFIG";

/// Bytes of a signing key below which it can be guessed: the output length of HMAC-SHA256 (RFC 7518 §3.2).
const JWT_SECRET_BYTES_MIN: usize = 32;
/// The longest that anything may be put off, in seconds.
const YEAR_SECONDS: u32 = 31_536_000;
/// Bytes of an operator's password: what a person cannot guess, and what bcrypt reads.
const PASSWORD_BYTES: std::ops::RangeInclusive<usize> = 8..=72;

/// Why the configuration was refused; each is one line that says what to do.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A key that does not exist, in the environment or in the file.
    #[error("{given} is no key{}; `stockade check-config` lists all", suggestion(*.nearest))]
    Unknown {
        /// The name as written.
        given: String,
        /// The known name most like it, if any is.
        nearest: Option<&'static str>,
    },
    /// A value that cannot be read or is out of range.
    #[error("{key}: {problem}")]
    Value {
        /// The key's name in the environment.
        key: &'static str,
        /// What is wrong and what would be right.
        problem: String,
    },
    /// Two keys that contradict each other.
    #[error("{0}")]
    Relation(&'static str),
    /// The TOML file could not be read.
    #[error("cannot read the configuration file: {0}")]
    File(String),
}

fn suggestion(nearest: Option<&'static str>) -> String {
    nearest.map_or_else(String::new, |name| format!(", did you mean {name}?"))
}

/// Where the stores come from.
#[derive(Clone, Debug)]
pub enum Stores {
    /// `serve` runs its own.
    Embedded,
    /// The operator runs them.
    External(Endpoints),
}

/// A configuration and where each value came from.
#[derive(Debug)]
pub struct Loaded {
    /// The configuration.
    pub config: Config,
    figment: Figment,
}

impl Loaded {
    /// Where a key's value came from: `default`, `environment` or the file's name; `None` if it is unset.
    pub fn source(&self, key: &Key) -> Option<String> {
        let metadata = self.figment.find_metadata(key.name)?;
        Some(match &metadata.source {
            Some(source) => source.to_string(),
            None => metadata.name.to_string(),
        })
    }

    /// A key's value as text; `[redacted]` if it is a secret, `None` if it is unset.
    pub fn shown(&self, key: &Key) -> Option<String> {
        let value = self.figment.find_value(key.name).ok()?;
        if key.secret {
            return Some("[redacted]".to_owned());
        }
        Some(text_of(&value))
    }
}

fn text_of(value: &Value) -> String {
    match value {
        Value::String(_, text) => text.clone(),
        Value::Bool(_, flag) => flag.to_string(),
        Value::Num(_, num) => num
            .to_u128()
            .map_or_else(|| format!("{num:?}"), |number| number.to_string()),
        Value::Array(_, items) => items.iter().map(text_of).collect::<Vec<_>>().join(","),
        other => format!("{other:?}"),
    }
}

impl Config {
    /// Loads and checks the configuration from environment variables and the file that they may name.
    ///
    /// An empty variable counts as unset, so that compose files can pass variables on.
    pub fn load(vars: impl IntoIterator<Item = (String, String)>) -> Result<Self, ConfigError> {
        Self::load_with_sources(vars).map(|loaded| loaded.config)
    }

    /// [`Config::load`], keeping where each value came from.
    pub fn load_with_sources(
        vars: impl IntoIterator<Item = (String, String)>,
    ) -> Result<Loaded, ConfigError> {
        let mut file = None;
        let mut environment = BTreeMap::new();
        for (name, value) in vars {
            if value.is_empty() {
                if name.starts_with("STOCKADE_") && name != FILE_ENV {
                    key_of_variable(&name)?;
                }
            } else if name == FILE_ENV {
                file = Some(PathBuf::from(value));
            } else if let Some((key, in_file)) = key_of_variable(&name)? {
                let value = if in_file {
                    secret_from_file(key, &value)?
                } else {
                    value
                };
                if environment.insert(key.name, value).is_some() {
                    return Err(self::value(
                        key.env,
                        "is given as a value and as a file: give one",
                    ));
                }
            }
        }
        let defaults = KEYS
            .iter()
            .filter_map(|key| Some((key.name, key.default?.to_owned())));
        let mut figment = Figment::from(Layer {
            name: "default",
            values: defaults.collect(),
        });
        if let Some(path) = &file {
            figment = figment.merge(Toml::file_exact(path));
            refuse_unknown_in_file(path)?;
        }
        figment = figment.merge(Layer {
            name: "environment",
            values: environment,
        });
        let config: Self = figment.extract_lossy().map_err(|error| readable(&error))?;
        config.check()?;
        Ok(Loaded { config, figment })
    }

    /// Where the stores come from. Half of them is an error: a server that starts its own PostgreSQL
    /// beside somebody's real Redis would sell real stock into a scratch database.
    pub fn stores(&self) -> Result<Stores, ConfigError> {
        match (&self.redis_url, &self.database_url) {
            (Some(redis_url), Some(database_url)) => Ok(Stores::External(Endpoints {
                redis_url: redis_url.clone(),
                cache_redis_url: self.cache_redis_url.clone(),
                database_url: database_url.clone(),
            })),
            (None, None) if self.cache_redis_url.is_some() => Err(ConfigError::Relation(
                "CACHE_REDIS_URL is set, but REDIS_URL and DATABASE_URL are not: set all, or none to run embedded stores",
            )),
            (None, None) => Ok(Stores::Embedded),
            (Some(_), None) => Err(ConfigError::Relation(
                "REDIS_URL is set, but DATABASE_URL is not: set both, or neither to run embedded stores",
            )),
            (None, Some(_)) => Err(ConfigError::Relation(
                "DATABASE_URL is set, but REDIS_URL is not: set both, or neither to run embedded stores",
            )),
        }
    }

    /// Checks what `serve` needs besides [`Config::load`]: whole stores, and a signing key unless it makes its own.
    pub fn check_for_serve(&self) -> Result<Stores, ConfigError> {
        let stores = self.stores()?;
        if matches!(stores, Stores::External(_)) && self.jwt_secret.is_none() {
            return Err(ConfigError::Relation(
                "STOCKADE_JWT_SECRET is not set: with stores of your own give every node the same one (`openssl rand -hex 32` makes one)",
            ));
        }
        Ok(stores)
    }

    /// The keys of access tokens by their numbers, the one that signs first; none when there is no
    /// secret.
    pub fn token_keys(&self) -> Result<Vec<(u8, &[u8])>, ConfigError> {
        const KEY: &str = "STOCKADE_JWT_KEYS";
        let own = self.jwt_secret.as_ref();
        let own = own.map(|secret| (1, secret.expose_secret().as_bytes()));
        let Some(list) = &self.jwt_keys else {
            return Ok(own.into_iter().collect());
        };
        let mut keys: Vec<(u8, &[u8])> = Vec::new();
        for (place, entry) in (1..).zip(list.expose_secret().split(',')) {
            let (number, secret) = match (entry.trim(), own) {
                ("1", Some(own)) => own,
                // Embedded, it is made later.
                ("1", None) => continue,
                (entry, _) => numbered(KEY, place, entry)?,
            };
            if number == 0 {
                return Err(value(KEY, "number 0 stands for no key: take 1 to 255"));
            }
            if keys.iter().any(|(known, _)| *known == number) {
                return Err(value(KEY, &format!("has key {number} twice")));
            }
            strong(KEY, &format!("key {number}"), secret)?;
            keys.push((number, secret));
        }
        Ok(keys)
    }

    /// The keys of receipts; `None` when there is nothing to make one from.
    pub fn receipt_keys(&self) -> Result<Option<ReceiptKeys>, ConfigError> {
        const KEY: &str = "STOCKADE_RECEIPT_KEYS";
        let mut keys = match &self.receipt_keys {
            Some(list) => listed(KEY, list.expose_secret())?,
            None => Vec::new(),
        };
        let derived = self
            .jwt_secret
            .as_ref()
            .map(|secret| ReceiptKeys::derive(secret.expose_secret().as_bytes()));
        if let Some(derived) = &derived
            && !keys.iter().any(|(number, _)| *number == 1)
        {
            keys.push((1, derived));
        }
        if keys.is_empty() {
            return Ok(None);
        }
        let keys = ReceiptKeys::new(&keys);
        keys.map(Some)
            .map_err(|error| value(KEY, &error.to_string()))
    }

    /// The keys that users' addresses and names are encrypted with.
    pub fn data_keys(&self) -> Result<DataKeys, ConfigError> {
        const KEY: &str = "STOCKADE_DATA_KEYS";
        let Some(list) = &self.data_keys else {
            return Ok(DataKeys::default());
        };
        let list = list.expose_secret().trim();
        let (plain, list) = match list.strip_prefix("plain,") {
            Some(rest) => (true, rest),
            None => (false, list),
        };
        let keys =
            DataKeys::new(&listed(KEY, list)?).map_err(|error| value(KEY, &error.to_string()))?;
        Ok(if plain { keys.only_open() } else { keys })
    }

    /// What the operator says about Redis.
    pub fn said(&self) -> Said {
        Said {
            replicas: self.replicas,
            asserted: self.redis_durability.map(|durability| match durability {
                RedisDurability::Fast => Durability::Fast,
                RedisDurability::Fsync => Durability::Fsync,
            }),
        }
    }

    /// Half of an identity provider lets nobody in, or too many.
    fn check_provider(&self) -> Result<(), ConfigError> {
        let parts = [&self.jwks_url, &self.jwt_issuer, &self.jwt_audience];
        let there = |part: &&Option<String>| part.as_ref().is_some_and(|text| !text.is_empty());
        let count = parts.iter().filter(|part| there(part)).count();
        if count != 0 && count != parts.len() {
            return Err(ConfigError::Relation(
                "STOCKADE_JWKS_URL, STOCKADE_JWT_ISSUER and STOCKADE_JWT_AUDIENCE belong together: set all, or none",
            ));
        }
        for (key, claim) in [
            ("STOCKADE_JWT_ROLE_CLAIM", &self.jwt_role_claim),
            ("STOCKADE_JWT_REGISTERED_CLAIM", &self.jwt_registered_claim),
        ] {
            if claim.is_empty() {
                return Err(value(key, "is empty"));
            }
        }
        Ok(())
    }

    /// Half of a gateway takes money that nobody hears of.
    fn check_gateways(&self) -> Result<(), ConfigError> {
        match (&self.stripe_secret_key, &self.stripe_webhook_secret) {
            (Some(_), None) => {
                return Err(ConfigError::Relation(
                    "STOCKADE_STRIPE_SECRET_KEY is set, but STOCKADE_STRIPE_WEBHOOK_SECRET is not: set both, or neither",
                ));
            }
            (None, Some(_)) => {
                return Err(ConfigError::Relation(
                    "STOCKADE_STRIPE_WEBHOOK_SECRET is set, but STOCKADE_STRIPE_SECRET_KEY is not: set both, or neither",
                ));
            }
            (Some(_), Some(_)) | (None, None) => {}
        }
        let paypal = [
            self.paypal_client_id.is_some(),
            self.paypal_client_secret.is_some(),
            self.paypal_webhook_id.is_some(),
        ];
        if paypal.contains(&true) && paypal.contains(&false) {
            return Err(ConfigError::Relation(
                "STOCKADE_PAYPAL_CLIENT_ID, STOCKADE_PAYPAL_CLIENT_SECRET and STOCKADE_PAYPAL_WEBHOOK_ID belong together: set all, or none",
            ));
        }
        for (key, url) in [
            ("STOCKADE_JWKS_URL", self.jwks_url.as_ref()),
            ("STOCKADE_STRIPE_URL", Some(&self.stripe_url)),
            ("STOCKADE_PAYPAL_URL", Some(&self.paypal_url)),
            (
                "STOCKADE_PAYMENT_RETURN_URL",
                self.payment_return_url.as_ref(),
            ),
        ] {
            let Some(url) = url else { continue };
            let parsed = url.parse::<hyper::Uri>();
            let local = |host: &str| matches!(host, "127.0.0.1" | "localhost" | "[::1]");
            let sound = parsed.is_ok_and(|parsed| match parsed.scheme_str() {
                Some("https") => true,
                // Money and keys do not travel in the clear.
                Some("http") => parsed.host().is_some_and(local),
                _ => false,
            });
            if !sound || url.ends_with('/') && key != "STOCKADE_PAYMENT_RETURN_URL" {
                return Err(value(
                    key,
                    "must begin with https:// (http:// to this machine only), without a slash at the end",
                ));
            }
        }
        Ok(())
    }

    fn check(&self) -> Result<(), ConfigError> {
        within("STOCKADE_REPLICAS", self.replicas, 0, 5)?;
        within("STOCKADE_DATABASE_POOL", self.database_pool, 2, 500)?;
        within("STOCKADE_PARTITIONS", self.partitions, 1, 1024)?;
        within("STOCKADE_BCRYPT_COST", self.bcrypt_cost, 10, 16)?;
        within(
            "STOCKADE_PASSWORD_HASH_QUEUE",
            self.password_hash_queue,
            1,
            1024,
        )?;
        within(
            "STOCKADE_REQUEST_TIMEOUT_MS",
            self.request_timeout_ms,
            3_000,
            60_000,
        )?;
        if let Some(connections) = self.connections_per_address {
            within(
                "STOCKADE_CONNECTIONS_PER_ADDRESS",
                connections,
                1,
                1_048_576,
            )?;
        }
        if self.tls_cert.is_some() != self.tls_key.is_some() {
            let (missing, given) = match self.tls_key {
                Some(_) => ("STOCKADE_TLS_CERT", "STOCKADE_TLS_KEY"),
                None => ("STOCKADE_TLS_KEY", "STOCKADE_TLS_CERT"),
            };
            let reason = format!("is not set, but {given} is: TLS needs both");
            return Err(value(missing, &reason));
        }
        within("STOCKADE_QUEUE_CAPACITY", self.queue_capacity, 1, 1_048_576)?;
        within("STOCKADE_GRACE_SECONDS", self.grace_seconds, 0, 86_400)?;
        within("STOCKADE_SETTLE_AFTER", self.settle_after, 0, YEAR_SECONDS)?;
        within(
            "STOCKADE_ARCHIVE_AFTER",
            self.archive_after,
            0,
            YEAR_SECONDS,
        )?;
        within(
            "STOCKADE_JOURNAL_RETENTION",
            self.journal_retention,
            0,
            YEAR_SECONDS,
        )?;
        if self.data_dir.as_os_str().is_empty() {
            return Err(value("STOCKADE_DATA_DIR", "is empty"));
        }
        for (key, url, schemes) in [
            ("REDIS_URL", &self.redis_url, &["redis://", "rediss://"][..]),
            (
                "CACHE_REDIS_URL",
                &self.cache_redis_url,
                &["redis://", "rediss://"][..],
            ),
            (
                "DATABASE_URL",
                &self.database_url,
                &["postgres://", "postgresql://"][..],
            ),
        ] {
            let wrong = url.as_ref().is_some_and(|url| {
                !schemes
                    .iter()
                    .any(|scheme| url.expose_secret().starts_with(scheme))
            });
            if wrong {
                return Err(value(
                    key,
                    &format!("must begin with {}", schemes.join(" or ")),
                ));
            }
        }
        for (key, secret) in [
            ("STOCKADE_JWT_SECRET", &self.jwt_secret),
            ("STOCKADE_CERTIFICATE_KEY", &self.certificate_key),
        ] {
            let Some(secret) = secret else { continue };
            strong(key, "the secret", secret.expose_secret().as_bytes())?;
        }
        self.token_keys()?;
        self.receipt_keys()?;
        self.data_keys()?;
        self.check_gateways()?;
        self.check_provider()?;
        if let Some(email) = &self.operator_email
            && !EmailAddress::is_valid(email)
        {
            return Err(value("STOCKADE_OPERATOR_EMAIL", "is not an e-mail address"));
        }
        if let Some(password) = &self.operator_password {
            let bytes = password.expose_secret().len();
            if !PASSWORD_BYTES.contains(&bytes) {
                return Err(value(
                    "STOCKADE_OPERATOR_PASSWORD",
                    &format!("has {bytes} bytes; 8 to 72 are needed"),
                ));
            }
        }
        if self.operator_password.is_some() && self.operator_email.is_none() {
            return Err(ConfigError::Relation(
                "STOCKADE_OPERATOR_PASSWORD is set, but STOCKADE_OPERATOR_EMAIL is not: set both or neither",
            ));
        }
        if self.operator_email.is_some() && self.operator_password.is_none() {
            return Err(ConfigError::Relation(
                "STOCKADE_OPERATOR_EMAIL is set, but STOCKADE_OPERATOR_PASSWORD is not: set both or neither",
            ));
        }
        if self.access_log_file.is_some() && self.access_log == AccessLog::Off {
            return Err(ConfigError::Relation(
                "STOCKADE_ACCESS_LOG_FILE is set, but STOCKADE_ACCESS_LOG is off: set it to combined or json",
            ));
        }
        if self.admin_addr == Some(self.http_addr) && self.http_addr.port() != 0 {
            return Err(ConfigError::Relation(
                "STOCKADE_ADMIN_ADDR is the same as STOCKADE_HTTP_ADDR: leave it unset, or give another port",
            ));
        }
        EnvFilter::try_new(&self.log)
            .map_err(|error| value("STOCKADE_LOG", &format!("is not a filter: {error}")))?;
        Ok(())
    }
}

fn value(key: &'static str, problem: &str) -> ConfigError {
    ConfigError::Value {
        key,
        problem: problem.to_owned(),
    }
}

/// Reads the entry `<number>:<secret>` at this place of a list.
fn numbered<'a>(
    key: &'static str,
    place: usize,
    entry: &'a str,
) -> Result<(u8, &'a [u8]), ConfigError> {
    let parts = entry.trim().split_once(':');
    let read = parts.and_then(|(number, secret)| Some((number.parse().ok()?, secret.as_bytes())));
    // What is written may be half a secret: it is never repeated.
    read.ok_or_else(|| {
        let problem =
            format!("entry {place} is not `<number>:<secret>`, with a number of 1 to 255");
        value(key, &problem)
    })
}

/// Refuses a secret that is short, or that anybody would try.
fn strong(key: &'static str, what: &str, secret: &[u8]) -> Result<(), ConfigError> {
    let remedy = "`openssl rand -hex 32` makes a good one";
    let bytes = secret.len();
    if bytes < JWT_SECRET_BYTES_MIN {
        let problem = format!(
            "{what} is too weak: {bytes} bytes, at least {JWT_SECRET_BYTES_MIN} needed ({remedy})"
        );
        return Err(value(key, &problem));
    }
    if guessable(secret) {
        let problem = format!("{what} is one that anybody would try first ({remedy})");
        return Err(value(key, &problem));
    }
    Ok(())
}

/// Whether a secret of many bytes is made of next to nothing: a few characters over and over, or the
/// words that stand in examples where a secret belongs.
fn guessable(secret: &[u8]) -> bool {
    // Hexadecimal digits at random have fewer than six in one secret of 10^20.
    const CHARACTERS_MIN: usize = 6;
    // Longer ones first: one is taken off after the other.
    const WORDS: &[&str] = &[
        "placeholder",
        "password",
        "changeme",
        "stockade",
        "insecure",
        "default",
        "example",
        "replace",
        "secret",
        "change",
        "please",
        "token",
        "super",
        "your",
        "this",
        "here",
        "jwt",
        "key",
        "me",
        "my",
    ];
    let mut characters: Vec<u8> = secret.to_vec();
    characters.sort_unstable();
    characters.dedup();
    if characters.len() < CHARACTERS_MIN {
        return true;
    }
    let text = String::from_utf8_lossy(secret).to_lowercase();
    let words = text.split(|c: char| !c.is_alphabetic());
    let mut words = words.filter(|word| !word.is_empty()).peekable();
    words.peek().is_some()
        && words.all(|mut rest| {
            while let Some(behind) = WORDS.iter().find_map(|word| rest.strip_prefix(word)) {
                rest = behind;
            }
            rest.is_empty()
        })
}

fn within<N: Copy + PartialOrd + std::fmt::Display>(
    key: &'static str,
    number: N,
    min: N,
    max: N,
) -> Result<(), ConfigError> {
    if number < min || number > max {
        return Err(value(
            key,
            &format!("is {number}; it must be {min} to {max}"),
        ));
    }
    Ok(())
}

/// The key that an environment variable sets, and whether the variable names a file that holds the value.
/// `None` for variables that are none of ours.
fn key_of_variable(name: &str) -> Result<Option<(&'static Key, bool)>, ConfigError> {
    for key in KEYS {
        if name == key.env {
            return Ok(Some((key, false)));
        }
        if key.secret && name.strip_suffix("_FILE") == Some(key.env) {
            return Ok(Some((key, true)));
        }
    }
    if faults::VARIABLES.contains(&name) {
        return Ok(None);
    }
    if name.starts_with("STOCKADE_") {
        let known = KEYS.iter().map(|key| key.env).chain([FILE_ENV]);
        return Err(ConfigError::Unknown {
            given: name.to_owned(),
            nearest: nearest(name, known),
        });
    }
    Ok(None)
}

fn secret_from_file(key: &'static Key, path: &str) -> Result<String, ConfigError> {
    let text = std::fs::read_to_string(path)
        .map_err(|error| value(key.env, &format!("cannot read the file {path}: {error}")))?;
    Ok(text.trim_end_matches(['\r', '\n']).to_owned())
}

fn refuse_unknown_in_file(path: &Path) -> Result<(), ConfigError> {
    let file = Figment::from(Toml::file_exact(path));
    let found: Dict = file
        .extract()
        .map_err(|error| ConfigError::File(one_line(&error.to_string())))?;
    for name in found.keys() {
        if !KEYS.iter().any(|key| key.name == name) {
            return Err(ConfigError::Unknown {
                given: format!("`{name}` in {}", path.display()),
                nearest: nearest(name, KEYS.iter().map(|key| key.name)),
            });
        }
    }
    Ok(())
}

fn nearest(given: &str, known: impl Iterator<Item = &'static str>) -> Option<&'static str> {
    /// Below this likeness a guess confuses more than it helps.
    const LIKENESS_MIN: f64 = 0.8;
    known
        .map(|name| (strsim::normalized_damerau_levenshtein(given, name), name))
        .filter(|(likeness, _)| *likeness >= LIKENESS_MIN)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, name)| name)
}

/// A list of keys, `<number>:<secret>` each.
fn listed<'a>(key: &'static str, list: &'a str) -> Result<Vec<(u8, &'a [u8])>, ConfigError> {
    let mut keys = Vec::new();
    for (place, entry) in (1..).zip(list.split(',')) {
        let (number, secret) = numbered(key, place, entry)?;
        // How short one may be the keys themselves say.
        if secret.len() >= JWT_SECRET_BYTES_MIN && guessable(secret) {
            let problem = format!("key {number} is one that anybody would try first");
            return Err(value(key, &problem));
        }
        keys.push((number, secret));
    }
    Ok(keys)
}

/// Figment's first problem in our words; a secret's value is never repeated.
fn readable(error: &figment::Error) -> ConfigError {
    let key = error
        .path
        .last()
        .and_then(|name| KEYS.iter().find(|key| key.name == name));
    match key {
        Some(key) if key.secret => value(key.env, "cannot be read: it must be text"),
        Some(key) => value(key.env, &one_line(&error.kind.to_string())),
        None => ConfigError::File(one_line(&error.to_string())),
    }
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Values as plain text under one name, so that a secret of digits stays text and an error can say its source.
struct Layer {
    name: &'static str,
    values: BTreeMap<&'static str, String>,
}

impl Provider for Layer {
    fn metadata(&self) -> Metadata {
        Metadata::named(self.name)
    }

    fn data(&self) -> Result<Map<Profile, Dict>, figment::Error> {
        let dict = self
            .values
            .iter()
            .map(|(key, text)| ((*key).to_owned(), Value::from(text.as_str())));
        Ok(Profile::Default.collect(dict.collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A secret that is long enough, and must never be shown.
    const LONG: &str = "canary:canary:canary:canary:canary";

    fn load(vars: &[(&str, &str)]) -> Result<Config, ConfigError> {
        Config::load(
            vars.iter()
                .map(|(name, value)| ((*name).to_owned(), (*value).to_owned())),
        )
    }

    fn refusal(vars: &[(&str, &str)]) -> String {
        let line = load(vars).unwrap_err().to_string();
        assert!(!line.contains('\n'), "one line: {line:?}");
        line
    }

    #[test]
    fn defaults_run_embedded() {
        let config = load(&[]).unwrap();
        assert_eq!(config.http_addr.to_string(), "127.0.0.1:8080");
        assert_eq!(config.admin_addr, None);
        assert_eq!(config.data_dir, Path::new(".stockade"));
        assert_eq!(config.queue_capacity, 16_384);
        assert_eq!(config.bcrypt_cost, 10);
        assert!(config.cors_origins.is_empty());
        assert!(matches!(config.check_for_serve(), Ok(Stores::Embedded)));
    }

    #[test]
    fn every_key_is_documented_and_named_after_its_field() {
        for key in KEYS {
            let meaning = key.meaning.concat();
            assert!(
                meaning.trim().ends_with('.'),
                "{}: the meaning is a sentence: {meaning}",
                key.name
            );
            let bare = key.env.strip_prefix("STOCKADE_").unwrap_or(key.env);
            assert_eq!(bare.to_lowercase(), key.name);
        }
    }

    #[test]
    fn the_example_file_lists_every_key_with_its_default() {
        let expected: Vec<String> = KEYS
            .iter()
            .map(|key| format!("#{}={}", key.env, key.default.unwrap_or_default()))
            .collect();
        let example = include_str!("../../.env.example");
        let listed: Vec<&str> = example
            .lines()
            .filter(|line| line.starts_with('#') && line.contains('='))
            .collect();
        assert_eq!(listed, expected);
    }

    #[test]
    fn an_unknown_key_is_an_error_with_a_suggestion() {
        assert_eq!(
            refusal(&[("STOCKADE_HTP_ADDR", "127.0.0.1:1")]),
            "STOCKADE_HTP_ADDR is no key, did you mean STOCKADE_HTTP_ADDR?; `stockade check-config` lists all"
        );
        assert_eq!(
            refusal(&[("STOCKADE_WARP", "")]),
            "STOCKADE_WARP is no key; `stockade check-config` lists all"
        );
        assert!(load(&[("HOME", "/root"), ("PATH", "/bin")]).is_ok());
    }

    #[test]
    fn half_of_the_stores_is_refused() {
        for vars in [
            &[("REDIS_URL", "redis://127.0.0.1:1")][..],
            &[("DATABASE_URL", "postgres://127.0.0.1/x")][..],
            &[("CACHE_REDIS_URL", "redis://127.0.0.1:1")][..],
        ] {
            let line = load(vars).unwrap().stores().unwrap_err().to_string();
            assert!(
                line.starts_with(vars[0].0) && line.contains("set "),
                "{line}"
            );
        }
    }

    #[test]
    fn half_of_an_identity_provider_is_refused() {
        let url = ("STOCKADE_JWKS_URL", "https://id.example.org/keys");
        let issuer = ("STOCKADE_JWT_ISSUER", "https://id.example.org");
        let audience = ("STOCKADE_JWT_AUDIENCE", "shop");
        assert!(load(&[url, issuer, audience]).is_ok());
        for half in [&[url][..], &[issuer], &[url, audience]] {
            assert!(refusal(half).contains("belong together"), "{half:?}");
        }
        let plain = ("STOCKADE_JWKS_URL", "http://id.example.org/keys");
        assert!(refusal(&[plain, issuer, audience]).starts_with("STOCKADE_JWKS_URL: "));
    }

    #[test]
    fn own_stores_need_a_signing_key() {
        let stores = [
            ("REDIS_URL", "redis://127.0.0.1:1"),
            ("DATABASE_URL", "postgres://127.0.0.1/x"),
        ];
        let line = load(&stores)
            .unwrap()
            .check_for_serve()
            .unwrap_err()
            .to_string();
        assert!(line.starts_with("STOCKADE_JWT_SECRET is not set"), "{line}");
        let digits = "12345678901234567890123456789012";
        let config = load(&[stores[0], stores[1], ("STOCKADE_JWT_SECRET", digits)]).unwrap();
        assert!(matches!(config.check_for_serve(), Ok(Stores::External(_))));
        assert_eq!(config.jwt_secret.unwrap().expose_secret(), digits);
    }

    #[test]
    fn weak_and_wrong_values_are_refused_in_one_line() {
        for (name, bad, part) in [
            (
                "STOCKADE_JWT_SECRET",
                "0123456789012345678901234567890",
                "31 bytes",
            ),
            (
                "STOCKADE_JWT_SECRET",
                "changeme-changeme-changeme-changeme",
                "anybody would try",
            ),
            (
                "STOCKADE_JWT_SECRET",
                "My_Super_Secret_JWT_Key_please_change_me_123",
                "anybody would try",
            ),
            (
                "STOCKADE_CERTIFICATE_KEY",
                &"x".repeat(32),
                "anybody would try",
            ),
            ("STOCKADE_JWT_KEYS", "2:short", "key 2 is too weak: 5 bytes"),
            ("STOCKADE_JWT_KEYS", LONG, "entry 1 is not"),
            ("STOCKADE_JWT_KEYS", &format!("0:{LONG}"), "number 0"),
            (
                "STOCKADE_JWT_KEYS",
                &format!("1:{LONG},1:{LONG}"),
                "key 1 twice",
            ),
            (
                "STOCKADE_JWT_KEYS",
                &format!("2:{LONG},1:{}", "ab".repeat(16)),
                "key 1 is one that anybody",
            ),
            (
                "STOCKADE_RECEIPT_KEYS",
                &format!("2:{}", "secret".repeat(6)),
                "key 2 is one that anybody",
            ),
            ("STOCKADE_HTTP_ADDR", "8080", "socket address"),
            ("STOCKADE_BCRYPT_COST", "9", "10 to 16"),
            ("STOCKADE_BCRYPT_COST", "ten", "u32"),
            ("STOCKADE_QUEUE_CAPACITY", "0", "1 to"),
            ("STOCKADE_REQUEST_TIMEOUT_MS", "2000", "3000 to 60000"),
            ("STOCKADE_RATE_LIMIT", "maybe", "`on`"),
            ("STOCKADE_CORS_ORIGINS", "https://a.example, *", "`*`"),
            (
                "STOCKADE_TRUSTED_PROXIES",
                "10.0.0.0/8, 10.0.0.0/33",
                "`10.0.0.0/33` is no network",
            ),
            ("STOCKADE_LIMITS", "user.reads=1+1/s", "user.purchase"),
            ("STOCKADE_LIMITS", "user.read=1/s", "no limit such as"),
            ("STOCKADE_LOG", "stockade=loud", "filter"),
            ("STOCKADE_OPERATOR_EMAIL", "nobody", "e-mail"),
            (
                "STOCKADE_RECEIPT_KEYS",
                "2:short",
                "key 2 is too weak: 5 bytes",
            ),
            ("STOCKADE_RECEIPT_KEYS", LONG, "entry 1 is not"),
            ("STOCKADE_RECEIPT_KEYS", &format!("256:{LONG}"), "1 to 255"),
            ("STOCKADE_RECEIPT_KEYS", &format!("0:{LONG}"), "number 0"),
            (
                "STOCKADE_RECEIPT_KEYS",
                &format!("1:{LONG},"),
                "entry 2 is not",
            ),
            (
                "STOCKADE_RECEIPT_KEYS",
                &format!("1:{LONG},1:{LONG}"),
                "key 1 twice",
            ),
            ("STOCKADE_DATA_KEYS", "2:short", "key 2 is too weak"),
            ("STOCKADE_DATA_KEYS", LONG, "entry 1 is not"),
            ("STOCKADE_DATA_KEYS", "plain", "entry 1 is not"),
            ("REDIS_URL", "http://x", "redis://"),
        ] {
            let line = refusal(&[(name, bad)]);
            assert!(
                line.starts_with(&format!("{name}: ")) && line.contains(part),
                "{line}"
            );
            assert!(!line.contains(LONG), "{line}");
        }
    }

    #[test]
    fn what_nobody_would_guess_is_no_weak_secret() {
        for good in [
            LONG,
            "correct horse battery staple, 32+ bytes",
            "6f1c0d9a6f1c0d9a6f1c0d9a6f1c0d9a",
            "a secret of the tests, 32 bytes!",
            "kkE2Jr0yWm3mS0mekeymyT8qYwq9v0sB",
        ] {
            assert!(!guessable(good.as_bytes()), "{good}");
        }
    }

    #[test]
    fn the_first_token_key_signs_and_no_other_is_believed() {
        let keys = |vars: &[(&str, &str)]| {
            let config = load(vars).unwrap();
            let keys = config.token_keys().unwrap();
            keys.iter().map(|(number, _)| *number).collect::<Vec<_>>()
        };
        let jwt = ("STOCKADE_JWT_SECRET", LONG);
        let list = &format!("3:{LONG}, 2:{LONG}");
        assert_eq!(keys(&[]), [0; 0]);
        assert_eq!(keys(&[jwt]), [1]);
        assert_eq!(keys(&[jwt, ("STOCKADE_JWT_KEYS", list)]), [3, 2]);
        // A bare 1 is the secret itself.
        let list = ("STOCKADE_JWT_KEYS", &*format!("2:{LONG}, 1"));
        assert_eq!(keys(&[jwt, list]), [2, 1]);
        assert_eq!(keys(&[list]), [2]);
    }

    #[test]
    fn the_first_receipt_key_signs_and_the_derived_one_stays() {
        let signing = |vars: &[(&str, &str)]| {
            let keys = load(vars).unwrap().receipt_keys().unwrap();
            keys.map(|keys| (keys.signing(), format!("{keys:?}")))
        };
        let found = |number, keys: &str| Some((number, keys.to_owned()));
        let jwt = ("STOCKADE_JWT_SECRET", LONG);
        assert_eq!(signing(&[]), None);
        assert_eq!(signing(&[jwt]), found(1, "{1}"));
        let list = &format!("3:{LONG}, 2:{LONG}");
        let keys = ("STOCKADE_RECEIPT_KEYS", list.as_str());
        assert_eq!(signing(&[keys]), found(3, "{3, 2}"));
        assert_eq!(signing(&[keys, jwt]), found(3, "{3, 2, 1}"));
        let list = &format!("2:{LONG},1:{LONG}");
        let keys = ("STOCKADE_RECEIPT_KEYS", list.as_str());
        assert_eq!(signing(&[keys, jwt]), found(2, "{2, 1}"));
    }

    #[test]
    fn contradictions_are_refused() {
        for vars in [
            &[("STOCKADE_OPERATOR_EMAIL", "a@example.com")][..],
            &[("STOCKADE_OPERATOR_PASSWORD", "long enough")][..],
            &[("STOCKADE_ACCESS_LOG_FILE", "/tmp/x")][..],
            &[("STOCKADE_ADMIN_ADDR", "127.0.0.1:8080")][..],
        ] {
            assert!(refusal(vars).starts_with(vars[0].0));
        }
    }

    #[test]
    fn environment_wins_over_the_file_and_the_file_over_defaults() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("stockade.toml");
        std::fs::write(
            &path,
            "bcrypt_cost = 11\nqueue_capacity = 7\ncors_origins = [\"https://a.example\"]\n",
        )
        .unwrap();
        let vars = [
            (FILE_ENV, path.to_str().unwrap()),
            ("STOCKADE_QUEUE_CAPACITY", "9"),
            ("STOCKADE_ADMIN_ADDR", ""),
        ];
        let loaded = Config::load_with_sources(
            vars.map(|(name, value)| (name.to_owned(), value.to_owned())),
        )
        .unwrap();
        assert_eq!(
            (loaded.config.bcrypt_cost, loaded.config.queue_capacity),
            (11, 9)
        );
        assert_eq!(
            loaded.config.cors_origins.iter().collect::<Vec<_>>(),
            ["https://a.example"]
        );
        let source = |name| loaded.source(KEYS.iter().find(|key| key.name == name).unwrap());
        assert_eq!(source("queue_capacity").as_deref(), Some("environment"));
        assert_eq!(source("log").as_deref(), Some("default"));
        assert!(source("bcrypt_cost").unwrap().contains("stockade.toml"));
        assert_eq!(source("admin_addr"), None);

        std::fs::write(&path, "bcrypt_costs = 11\n").unwrap();
        let line = refusal(&[(FILE_ENV, path.to_str().unwrap())]);
        assert!(line.contains("did you mean bcrypt_cost?"), "{line}");
        std::fs::write(&path, "bcrypt_cost = \n").unwrap();
        refusal(&[(FILE_ENV, path.to_str().unwrap())]);
        refusal(&[(FILE_ENV, "/no/such/file.toml")]);
    }

    #[test]
    fn a_secret_may_come_from_a_file_and_is_never_shown() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("secret");
        std::fs::write(&path, "canary-canary-canary-canary-canary\n").unwrap();
        let vars = [(
            "STOCKADE_JWT_SECRET_FILE".to_owned(),
            path.display().to_string(),
        )];
        let loaded = Config::load_with_sources(vars).unwrap();
        let secret = loaded.config.jwt_secret.as_ref().unwrap();
        assert_eq!(secret.expose_secret(), "canary-canary-canary-canary-canary");
        assert!(!format!("{:?}", loaded.config).contains("canary"));
        let key = KEYS.iter().find(|key| key.name == "jwt_secret").unwrap();
        assert_eq!(loaded.shown(key).as_deref(), Some("[redacted]"));

        std::fs::write(dir.path().join("c.toml"), "jwt_secret = 424242424242\n").unwrap();
        let line = refusal(&[(FILE_ENV, dir.path().join("c.toml").to_str().unwrap())]);
        assert!(!line.contains("4242"), "{line}");
    }
}
