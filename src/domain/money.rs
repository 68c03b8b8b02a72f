//! Prices: whole minor units of a currency, never a fraction.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use super::limits::AMOUNT_MAX;

/// An ISO 4217 code: three capital letters.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Currency([u8; 3]);

impl Currency {
    /// Reads a code.
    ///
    /// # Errors
    /// [`MoneyError::Currency`] when it is not three capital ASCII letters.
    pub fn parse(code: &str) -> Result<Self, MoneyError> {
        match code.as_bytes() {
            [a, b, c] if code.bytes().all(|byte| byte.is_ascii_uppercase()) => {
                Ok(Self([*a, *b, *c]))
            }
            _ => Err(MoneyError::Currency),
        }
    }

    /// The code.
    pub fn as_str(&self) -> &str {
        // Only capital ASCII letters ever get in.
        str::from_utf8(&self.0).unwrap_or_default()
    }

    /// The code as it stands in packed records.
    pub fn bytes(self) -> [u8; 3] {
        self.0
    }
}

impl fmt::Debug for Currency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl Serialize for Currency {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

impl<'de> Deserialize<'de> for Currency {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let code = String::deserialize(deserializer)?;
        Self::parse(&code).map_err(de::Error::custom)
    }
}

/// An amount of money.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Money {
    /// Minor units (cents), 0 … 10^14.
    pub amount: i64,
    /// Of which currency.
    pub currency: Currency,
}

impl Money {
    /// An amount within bounds.
    ///
    /// # Errors
    /// [`MoneyError::Amount`] when it is negative or above [`AMOUNT_MAX`].
    pub fn new(amount: i64, currency: Currency) -> Result<Self, MoneyError> {
        if (0..=AMOUNT_MAX).contains(&amount) {
            Ok(Self { amount, currency })
        } else {
            Err(MoneyError::Amount)
        }
    }

    /// The price of `quantity` units; `None` where it leaves 64 bits.
    pub fn times(self, quantity: u64) -> Option<Self> {
        let amount = self.amount.checked_mul(i64::try_from(quantity).ok()?)?;
        Some(Self { amount, ..self })
    }
}

/// Why something is not money.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MoneyError {
    /// Out of bounds.
    #[error("an amount is a whole number of minor units from 0 to {AMOUNT_MAX}")]
    Amount,
    /// Not a currency code.
    #[error("a currency is three capital letters, such as EUR")]
    Currency,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_codes_are_currencies() {
        assert_eq!(Currency::parse("EUR").unwrap().as_str(), "EUR");
        for bad in ["", "EU", "EURO", "eur", "E1R", "€"] {
            assert_eq!(Currency::parse(bad), Err(MoneyError::Currency), "{bad}");
        }
    }

    #[test]
    fn amounts_have_bounds() {
        let eur = Currency::parse("EUR").unwrap();
        assert!(Money::new(-1, eur).is_err());
        assert!(Money::new(AMOUNT_MAX + 1, eur).is_err());
        let most = Money::new(AMOUNT_MAX, eur).unwrap();
        assert_eq!(most.times(2).unwrap().amount, 2 * AMOUNT_MAX);
        assert_eq!(most.times(1_000_000), None);
    }
}
