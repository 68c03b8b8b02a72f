//! The types of single values: each knows the words it is written in.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ipnet::{IpNet, Ipv4Net};
use serde::{Deserialize, Deserializer, de};

use crate::domain::allowance::Allowances;

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
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        list(deserializer)?
            .into_iter()
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

/// Reads a list (TOML) or one string separated by commas (environment), without what is empty.
fn list<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Written {
        One(String),
        Many(Vec<String>),
    }
    let mut many = match Written::deserialize(deserializer)? {
        Written::One(list) => list.split(',').map(|item| item.trim().to_owned()).collect(),
        Written::Many(many) => many,
    };
    many.retain(|item| !item.is_empty());
    Ok(many)
}

/// Networks and single addresses, such as `10.0.0.0/8` and `2001:db8::1`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Networks(Vec<IpNet>);

impl Networks {
    /// Whether one of them has this address. One of IPv4 in the form of IPv6 is one of IPv4.
    pub fn contain(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        self.0.iter().any(|network| network.contains(&address))
    }

    /// This machine itself.
    pub fn loopback() -> Self {
        let (v4, v6) = (
            Ipv4Net::new_assert(Ipv4Addr::LOCALHOST, 8),
            Ipv6Addr::LOCALHOST,
        );
        Self(vec![v4.into(), IpAddr::V6(v6).into()])
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl fmt::Display for Networks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (place, network) in self.0.iter().enumerate() {
            write!(f, "{}{network}", if place == 0 { "" } else { ", " })?;
        }
        Ok(())
    }
}

impl<'de> Deserialize<'de> for Networks {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let network = |text: String| {
            let alone = || {
                text.parse()
                    .map(|address: IpAddr| address.to_canonical().into())
            };
            let network = text.parse().or_else(|_| alone());
            network.map_err(|_| {
                de::Error::custom(format_args!("`{text}` is no network such as 10.0.0.0/8"))
            })
        };
        list(deserializer)?
            .into_iter()
            .map(network)
            .collect::<Result<_, _>>()
            .map(Self)
    }
}

impl<'de> Deserialize<'de> for Allowances {
    /// The usual ones, changed where the list says so.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut allowances = Self::default();
        for change in list(deserializer)? {
            allowances.change(&change).map_err(de::Error::custom)?;
        }
        Ok(allowances)
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
