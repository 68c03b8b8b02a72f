//! The types of single values: each knows the words it is written in.

use std::fmt;

use serde::{Deserialize, Deserializer, de};

/// Whether limits per user, address and route are applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RateLimit {
    /// Applied.
    On,
    /// Not applied: for benchmarks.
    Off,
}

/// Whether something is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Switch {
    /// It is.
    On,
    /// It is not.
    Off,
}

/// What the file of a Redis server is worth that does not show its settings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RedisDurability {
    /// `appendfsync everysec`
    Fast,
    /// `appendfsync always`
    Fsync,
}

/// The form of the access log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AccessLog {
    /// None is written.
    Off,
    /// The combined format of the common web servers.
    Combined,
    /// One JSON object a line.
    Json,
}

/// The form of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// Origins that browsers may call from, each exactly as a browser sends it: scheme, host and port, no path.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Origins(Vec<String>);

impl Origins {
    /// The origins in the order given.
    pub fn iter(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(String::as_str)
    }

    /// Whether no browser may call from another origin.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl<'de> Deserialize<'de> for Origins {
    /// Reads a list (TOML) or one string separated by commas (environment).
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Written {
            One(String),
            Many(Vec<String>),
        }
        let many = match Written::deserialize(deserializer)? {
            Written::One(list) => list
                .split(',')
                .map(|origin| origin.trim().to_owned())
                .collect(),
            Written::Many(many) => many,
        };
        many.into_iter()
            .filter(|origin| !origin.is_empty())
            .map(|origin| {
                if is_origin(&origin) {
                    Ok(origin)
                } else {
                    Err(de::Error::custom(NotAnOrigin(origin)))
                }
            })
            .collect::<Result<_, _>>()
            .map(Self)
    }
}

struct NotAnOrigin(String);

impl fmt::Display for NotAnOrigin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "`{}` is not an origin such as https://shop.example",
            self.0
        )
    }
}

/// Scheme, host and optional port in the lower case that browsers send; no `*`, no path, no trailing slash.
fn is_origin(text: &str) -> bool {
    let Some(authority) = text
        .strip_prefix("https://")
        .or_else(|| text.strip_prefix("http://"))
    else {
        return false;
    };
    !authority.is_empty()
        && authority.bytes().all(|byte| {
            byte.is_ascii_lowercase()
                || byte.is_ascii_digit()
                || matches!(byte, b'.' | b'-' | b':' | b'[' | b']')
        })
}

#[cfg(test)]
mod tests {
    use super::is_origin;

    #[test]
    fn an_origin_is_scheme_host_and_port() {
        for good in [
            "https://shop.example",
            "http://localhost:3000",
            "http://[::1]:8080",
        ] {
            assert!(is_origin(good), "{good}");
        }
        for bad in [
            "*",
            "shop.example",
            "https://",
            "https://shop.example/",
            "https://*.example",
            "https://A.example",
        ] {
            assert!(!is_origin(bad), "{bad}");
        }
    }
}
