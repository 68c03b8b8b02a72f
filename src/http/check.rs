//! Checks of values that could be read: bounds, collected so that a client learns all at once.

use std::{borrow::Cow, fmt, ops::RangeInclusive};

use chrono::{DateTime, Datelike, SecondsFormat, Utc};
use serde::{Deserialize, Serialize, de::Error};
use utoipa::ToSchema;

use super::{
    body::Object,
    problem::{FieldError, Problem},
};
use crate::domain::money::{Currency, Money, MoneyError};

/// Collects what is out of range.
///
/// Numbers come in as `i64`: what is no whole number of 64 bits cannot be read (400), and what is
/// one but makes no sense is out of range (422).
#[derive(Debug, Default)]
pub(super) struct Check(Vec<FieldError>);

impl Check {
    /// Nothing is wrong so far.
    pub(super) fn new() -> Self {
        Self::default()
    }

    /// A whole number within `range`; a value in range stands in when it is not.
    pub(super) fn units(&mut self, pointer: &str, value: i64, range: RangeInclusive<u64>) -> u64 {
        match u64::try_from(value) {
            Ok(value) if range.contains(&value) => value,
            _ => {
                self.refuse(
                    pointer,
                    format!("must be {} to {}", range.start(), range.end()),
                );
                *range.start()
            }
        }
    }

    /// A text of so many characters, trimmed, without control characters but line breaks and
    /// tabs: PostgreSQL cannot hold NUL, and nothing should hold the others.
    pub(super) fn text(
        &mut self,
        pointer: &str,
        value: &str,
        characters: RangeInclusive<usize>,
    ) -> String {
        let value = value.trim();
        if !characters.contains(&value.chars().count()) {
            let (start, end) = (characters.start(), characters.end());
            self.refuse(pointer, format!("must have {start} to {end} characters"));
        }
        if value.contains(|c: char| c.is_control() && !matches!(c, '\n' | '\r' | '\t')) {
            self.refuse(pointer, "must not contain control characters");
        }
        value.to_owned()
    }

    /// An instant in the years 1970 to 9999, in milliseconds since the Unix epoch.
    pub(super) fn instant(&mut self, pointer: &str, value: Timestamp) -> i64 {
        if !(1970..=9999).contains(&value.0.year()) {
            self.refuse(pointer, "must lie in the years 1970 to 9999 (UTC)");
        }
        value.0.timestamp_millis()
    }

    /// An amount of money; nothing when it is none.
    pub(super) fn price(&mut self, pointer: &str, price: &Price) -> Option<Money> {
        let money = Currency::parse(&price.currency)
            .and_then(|currency| Money::new(price.amount, currency));
        money
            .map_err(|error| {
                let member = match error {
                    MoneyError::Amount => "amount",
                    MoneyError::Currency => "currency",
                };
                self.refuse(&format!("{pointer}/{member}"), error.to_string());
            })
            .ok()
    }

    /// Something else is wrong.
    pub(super) fn refuse(&mut self, pointer: &str, detail: impl Into<String>) {
        self.0.push(FieldError::new(pointer, detail));
    }

    /// The end, with a value that is only missing if it was refused.
    pub(super) fn done_with<T>(self, value: Option<T>) -> Result<T, Problem> {
        match value {
            Some(value) if self.0.is_empty() => Ok(value),
            _ => Err(Problem::out_of_range(self.0)),
        }
    }

    /// The end: a refusal, if anything was wrong.
    pub(super) fn done(self) -> Result<(), Problem> {
        if self.0.is_empty() {
            Ok(())
        } else {
            Err(Problem::out_of_range(self.0))
        }
    }
}

/// Money as a client writes and reads it.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(from = "Object<PriceMembers>")]
pub(super) struct Price {
    /// Minor units (cents), 0 to 10^14.
    #[schema(example = 1999, minimum = 0, maximum = 100_000_000_000_000_i64)]
    pub(super) amount: i64,
    /// ISO 4217.
    #[schema(example = "EUR", pattern = "^[A-Z]{3}$")]
    pub(super) currency: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PriceMembers {
    amount: i64,
    currency: String,
}

impl From<Object<PriceMembers>> for Price {
    fn from(Object(PriceMembers { amount, currency }): Object<PriceMembers>) -> Self {
        Self { amount, currency }
    }
}

impl From<Money> for Price {
    fn from(money: Money) -> Self {
        Self {
            amount: money.amount,
            currency: money.currency.as_str().to_owned(),
        }
    }
}

/// An instant as a client reads it: RFC 3339, UTC, exactly three decimals.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ToSchema)]
#[schema(value_type = String, format = DateTime, example = "2026-11-27T09:00:00.000Z")]
pub(super) struct Timestamp(pub(super) DateTime<Utc>);

impl Timestamp {
    /// The instant so many milliseconds after the Unix epoch.
    pub(super) fn from_ms(ms: i64) -> Self {
        Self(DateTime::from_timestamp_millis(ms).unwrap_or_default())
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Several times faster than a format string, and every 201 has one.
        f.write_str(&self.0.to_rfc3339_opts(SecondsFormat::Millis, true))
    }
}

impl Serialize for Timestamp {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// RFC 3339 with any offset, read to the millisecond.
impl<'de> Deserialize<'de> for Timestamp {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = Cow::<str>::deserialize(deserializer)?;
        DateTime::parse_from_rfc3339(&text)
            .map(|instant| Self::from_ms(instant.timestamp_millis()))
            .map_err(|_| {
                D::Error::custom("must be a timestamp like 2026-11-27T09:00:00.000Z (RFC 3339)")
            })
    }
}

/// Reads a member that may be absent but not null.
pub(super) fn present<'de, D, T>(deserializer: D) -> Result<Option<T>, D::Error>
where
    D: serde::Deserializer<'de>,
    T: Deserialize<'de>,
{
    T::deserialize(deserializer).map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_wrong_is_told_at_once() {
        let mut check = Check::new();
        assert_eq!(check.units("#/a", 5, 1..=10), 5);
        for bad in [0, -1, 11, 1_000_000_000, i64::MIN] {
            check.units("#/b", bad, 1..=10);
        }
        assert_eq!(check.text("#/c", " x ", 1..=3), "x");
        for bad in ["", "  ", "long", "a\0b"] {
            check.text("#/d", bad, 1..=3);
        }
        check.price(
            "#/e",
            &Price {
                amount: -1,
                currency: "EUR".into(),
            },
        );
        check.price(
            "#/e",
            &Price {
                amount: 1,
                currency: "eur".into(),
            },
        );
        let pointers: Vec<_> = check.0.iter().map(|error| error.pointer.as_str()).collect();
        assert_eq!(
            pointers,
            [
                "#/b",
                "#/b",
                "#/b",
                "#/b",
                "#/b",
                "#/d",
                "#/d",
                "#/d",
                "#/d",
                "#/e/amount",
                "#/e/currency"
            ]
        );
        assert!(check.done().is_err());
        assert!(Check::new().done().is_ok());
    }

    #[test]
    fn timestamps_have_three_decimals() {
        for (ms, text) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (1_764_000_000_120, "2025-11-24T16:00:00.120Z"),
        ] {
            assert_eq!(serde_json::to_value(Timestamp::from_ms(ms)).unwrap(), text);
        }
    }
}
