//! What a buyer is called on a leaderboard: always the same in one sale, never the same in two,
//! and no way back to the buyer.

use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

use crate::domain::id::{BuyerId, SaleId};

/// Makes pseudonyms with a secret key.
#[derive(Clone)]
pub struct Pseudonyms(Hmac<Sha256>);

impl std::fmt::Debug for Pseudonyms {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Pseudonyms([redacted])")
    }
}

impl Pseudonyms {
    /// Pseudonyms under a key of their own, derived from the server's secret.
    ///
    /// # Errors
    /// Never for HMAC, which takes keys of any length.
    pub fn new(secret: &[u8]) -> Result<Self, hmac::digest::InvalidLength> {
        let mut key = Hmac::<Sha256>::new_from_slice(secret)?;
        key.update(b"stockade leaderboard");
        let key = key.finalize().into_bytes();
        Ok(Self(Hmac::new_from_slice(&key)?))
    }

    /// The buyer's name in this sale: sixteen characters.
    pub fn of(&self, sale: SaleId, buyer: BuyerId) -> String {
        let mut mac = self.0.clone();
        mac.update(sale.0.as_bytes());
        mac.update(buyer.0.as_bytes());
        BASE64_URL_SAFE_NO_PAD.encode(&mac.finalize().into_bytes()[..12])
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    #[test]
    fn a_pseudonym_depends_on_sale_buyer_and_secret() {
        let (sale, buyer) = (SaleId(Uuid::from_u128(1)), BuyerId(Uuid::from_u128(2)));
        let names = Pseudonyms::new(b"secret").unwrap();
        let name = names.of(sale, buyer);
        assert_eq!(name.len(), 16);
        assert_eq!(name, names.of(sale, buyer));
        assert_ne!(name, names.of(sale, BuyerId(Uuid::from_u128(3))));
        assert_ne!(name, names.of(SaleId(Uuid::from_u128(3)), buyer));
        assert_ne!(name, Pseudonyms::new(b"other").unwrap().of(sale, buyer));
    }
}
