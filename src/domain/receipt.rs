//! Receipts: the signed proof of an acceptance, which its buyer keeps.
//!
//! `v1.<key>.<payload>.<signature>`. The payload is fixed fields of fixed length in base64url, the
//! signature HMAC-SHA256 over everything before its dot. One order has one receipt: the same
//! bytes whenever they are asked for, as long as its key is configured.

use std::fmt::{self, Write};

use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;
use uuid::Uuid;

use super::{
    id::{BuyerId, Epoch, Fingerprint, OrderId, RoundId, SaleId},
    money::{Currency, Money},
    order::{Durability, Order, Status},
};

/// The form that this build signs, and the only one that it verifies.
const FORM: &str = "v1";

/// Bytes of a payload: sale 16, order 16 (begins with the sale's number), buyer 16, round 4,
/// epoch 4, seq 8, pseq 8, quantity 8, price 8 + 3, instant 8, fingerprint 8, durability 1,
/// status 1.
const PAYLOAD_BYTES: usize = 3 * 16 + 2 * 4 + 3 * 8 + 11 + 8 + 8 + 2;

/// Bytes of a receipt at most: form, key of three digits, payload, 32 bytes of signature.
const TEXT_BYTES: usize = 3 + 4 + (PAYLOAD_BYTES * 4).div_ceil(3) + 1 + 43;

/// The shortest secret, in bytes: as long as the hash.
pub const SECRET_MIN_BYTES: usize = 32;

/// What a receipt proves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Receipt {
    /// The sale, by the name that the API knows.
    pub sale: SaleId,
    /// The order as it was accepted.
    pub order: Order,
}

/// Why keys cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// There is none.
    #[error("has no key")]
    None,
    /// 0 stands for orders without a receipt.
    #[error("has a key with the number 0; 1 to 255 are numbers of keys")]
    Zero,
    /// Two keys with one number.
    #[error("has key {0} twice")]
    Twice(u8),
    /// A secret that could be guessed.
    #[error(
        "key {number} is too weak: {bytes} bytes, at least {SECRET_MIN_BYTES} needed (`openssl rand -hex 32` makes a good one)"
    )]
    Weak {
        /// Whose.
        number: u8,
        /// How long it is.
        bytes: usize,
    },
}

impl KeyError {
    /// Whether these can be keys, by their numbers.
    pub(super) fn check(secrets: &[(u8, &[u8])]) -> Result<(), Self> {
        for (at, &(number, secret)) in secrets.iter().enumerate() {
            let (bytes, mut before) = (secret.len(), secrets.iter().take(at));
            if number == 0 {
                return Err(Self::Zero);
            } else if before.any(|(known, _)| *known == number) {
                return Err(Self::Twice(number));
            } else if bytes < SECRET_MIN_BYTES {
                return Err(Self::Weak { number, bytes });
            }
        }
        if secrets.is_empty() {
            return Err(Self::None);
        }
        Ok(())
    }
}

/// The key that signed an order's receipt is not configured any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("key {0} of receipts is not configured")]
pub struct UnknownKey(pub u8);

/// Why a text is no receipt to believe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Invalid {
    /// Not signed by the key that it names.
    #[error("is not a receipt of this server")]
    Forged,
    /// It may be one, but nobody here can tell.
    #[error("is signed with a key that is not known here any more")]
    UnknownKey,
}

/// The keys in use: the first signs, all verify.
#[derive(Clone)]
pub struct ReceiptKeys(Vec<(u8, Hmac<Sha256>)>);

impl fmt::Debug for ReceiptKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let numbers = self.0.iter().map(|(number, _)| number);
        f.debug_set().entries(numbers).finish()
    }
}

impl ReceiptKeys {
    /// Keys by their numbers, 1 to 255; the first signs.
    ///
    /// # Errors
    /// [`KeyError`].
    pub fn new(secrets: &[(u8, &[u8])]) -> Result<Self, KeyError> {
        KeyError::check(secrets)?;
        let mut keys: Vec<(u8, Hmac<Sha256>)> = Vec::with_capacity(secrets.len());
        for &(number, secret) in secrets {
            let bytes = secret.len();
            let weak = KeyError::Weak { number, bytes };
            // HMAC takes keys of any length.
            keys.push((number, Hmac::new_from_slice(secret).map_err(|_| weak)?));
        }
        Ok(Self(keys))
    }

    /// The key that a server without keys of its own signs with, derived from another secret.
    pub fn derive(secret: &[u8]) -> Vec<u8> {
        // HMAC takes keys of any length.
        Hmac::<Sha256>::new_from_slice(secret).map_or_else(
            |_| Vec::new(),
            |mut mac| {
                mac.update(b"stockade receipt key 1");
                mac.finalize().into_bytes().to_vec()
            },
        )
    }

    /// The number of the key that signs.
    pub fn signing(&self) -> u8 {
        self.0.first().map_or(0, |(number, _)| *number)
    }

    /// What each key is, by its number: enough to see that it is another one, and no more.
    pub fn fingerprints(&self) -> Vec<(u8, [u8; 8])> {
        let print = |(number, key): &(u8, Hmac<Sha256>)| {
            let mut mac = key.clone();
            mac.update(b"stockade fingerprint of a receipt key");
            let mut print = [0; 8];
            for (byte, of) in print.iter_mut().zip(mac.finalize().into_bytes()) {
                *byte = of;
            }
            (*number, print)
        };
        self.0.iter().map(print).collect()
    }

    /// Forgets a key: what it signed is then neither signed nor believed.
    pub fn forget(&mut self, number: u8) {
        self.0.retain(|(known, _)| *known != number);
    }

    fn key(&self, number: u8) -> Option<&Hmac<Sha256>> {
        let found = self.0.iter().find(|(known, _)| *known == number);
        found.map(|(_, key)| key)
    }

    /// The receipt of an order, whatever has become of it since; `None` for one from before there
    /// were receipts.
    ///
    /// # Errors
    /// [`UnknownKey`]: no other key will do, because its bytes would be others.
    pub fn sign(&self, sale: SaleId, order: &Order) -> Result<Option<String>, UnknownKey> {
        let number = order.receipt_key;
        if number == 0 {
            return Ok(None);
        }
        let key = self.key(number).ok_or(UnknownKey(number))?;
        let mut text = String::with_capacity(TEXT_BYTES);
        // Writing to a string does not fail.
        let _ = write!(text, "{FORM}.{number}.");
        BASE64_URL_SAFE_NO_PAD.encode_string(pack(sale, order), &mut text);
        let mut mac = key.clone();
        mac.update(text.as_bytes());
        text.push('.');
        BASE64_URL_SAFE_NO_PAD.encode_string(mac.finalize().into_bytes(), &mut text);
        Ok(Some(text))
    }

    /// What a receipt proves, if one of these keys signed it. In constant time for one length.
    ///
    /// # Errors
    /// [`Invalid`].
    pub fn verify(&self, text: &str) -> Result<Receipt, Invalid> {
        let (signed, signature) = text.rsplit_once('.').ok_or(Invalid::Forged)?;
        let rest = signed
            .strip_prefix(FORM)
            .and_then(|rest| rest.strip_prefix('.'));
        let (number, payload) = rest
            .and_then(|rest| rest.split_once('.'))
            .ok_or(Invalid::Forged)?;
        let number: u8 = number.parse().map_err(|_| Invalid::Forged)?;
        let payload = BASE64_URL_SAFE_NO_PAD
            .decode(payload)
            .map_err(|_| Invalid::Forged)?;
        let signature = BASE64_URL_SAFE_NO_PAD
            .decode(signature)
            .map_err(|_| Invalid::Forged)?;
        let mut mac = self.key(number).ok_or(Invalid::UnknownKey)?.clone();
        mac.update(signed.as_bytes());
        mac.verify_slice(&signature).map_err(|_| Invalid::Forged)?;
        unpack(&payload, number).ok_or(Invalid::Forged)
    }
}

fn pack(sale: SaleId, order: &Order) -> [u8; PAYLOAD_BYTES] {
    let mut payload = [0; PAYLOAD_BYTES];
    let mut rest = payload.as_mut_slice();
    let Order {
        id,
        round,
        buyer,
        quantity,
        unit_price,
        accepted_as,
        durability,
        epoch,
        seq,
        pseq,
        accepted_at_ms,
        fingerprint,
        // What happened later, and what the round says of holds.
        status: _,
        receipt_key: _,
        hold_ms: _,
        extended_ms: _,
        returned: _,
        refunded: _,
    } = order;
    for bytes in [
        sale.0.as_bytes().as_slice(),
        id.0.as_bytes(),
        buyer.0.as_bytes(),
        &round.round.to_be_bytes(),
        &epoch.0.to_be_bytes(),
        &seq.to_be_bytes(),
        &pseq.to_be_bytes(),
        &quantity.to_be_bytes(),
        &unit_price.amount.to_be_bytes(),
        &unit_price.currency.bytes(),
        &accepted_at_ms.to_be_bytes(),
        &fingerprint.0,
        &[durability.byte(), accepted_as.byte()],
    ] {
        let (field, behind) = rest.split_at_mut(bytes.len());
        field.copy_from_slice(bytes);
        rest = behind;
    }
    payload
}

fn unpack(mut payload: &[u8], receipt_key: u8) -> Option<Receipt> {
    fn take<const N: usize>(payload: &mut &[u8]) -> Option<[u8; N]> {
        let (field, rest) = payload.split_first_chunk::<N>()?;
        *payload = rest;
        Some(*field)
    }
    let from = &mut payload;
    let sale = SaleId(Uuid::from_bytes(take(from)?));
    let id = OrderId(Uuid::from_bytes(take(from)?));
    let buyer = BuyerId(Uuid::from_bytes(take(from)?));
    let round = RoundId {
        sale: id.sale(),
        round: u32::from_be_bytes(take(from)?),
    };
    let epoch = Epoch(u32::from_be_bytes(take(from)?));
    let [seq, pseq, quantity] = [take(from)?, take(from)?, take(from)?].map(u64::from_be_bytes);
    let amount = i64::from_be_bytes(take(from)?);
    let currency: [u8; 3] = take(from)?;
    let accepted_at_ms = i64::from_be_bytes(take(from)?);
    let fingerprint = Fingerprint(take(from)?);
    let [durability, status] = take(from)?;
    let status = Status::from_byte(status)?;
    let currency = Currency::parse(str::from_utf8(&currency).ok()?).ok()?;
    let order = Order {
        id,
        round,
        buyer,
        quantity,
        unit_price: Money::new(amount, currency).ok()?,
        status,
        accepted_as: status,
        durability: Durability::from_byte(durability)?,
        receipt_key,
        epoch,
        seq,
        pseq,
        accepted_at_ms,
        fingerprint,
        hold_ms: 0,
        extended_ms: 0,
        returned: 0,
        refunded: 0,
    };
    from.is_empty().then_some(Receipt { sale, order })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::domain::id::SaleNumber;

    const ONE: &[u8] = b"the first secret of the tests: 32";
    const TWO: &[u8] = b"the second secret of the tests: 32";

    fn receipt(receipt_key: u8) -> Receipt {
        let (sale, buyer) = (SaleNumber(7), BuyerId(Uuid::from_u128(2)));
        let order = Order {
            id: OrderId::derive(sale, buyer, "k"),
            round: RoundId { sale, round: 3 },
            buyer,
            quantity: 4,
            unit_price: Money::new(1999, Currency::parse("EUR").unwrap()).unwrap(),
            status: Status::Confirmed,
            accepted_as: Status::Confirmed,
            durability: Durability::Fsync,
            receipt_key,
            epoch: Epoch(5),
            seq: 6,
            pseq: 7,
            accepted_at_ms: 1_764_000_000_120,
            fingerprint: Fingerprint([8; 8]),
            hold_ms: 0,
            extended_ms: 0,
            returned: 0,
            refunded: 0,
        };
        let sale = SaleId(Uuid::from_u128(1));
        Receipt { sale, order }
    }

    fn signed(keys: &ReceiptKeys, Receipt { sale, order }: Receipt) -> String {
        keys.sign(sale, &order).unwrap().unwrap()
    }

    #[test]
    fn a_receipt_proves_what_was_accepted_whatever_came_later() {
        let keys = ReceiptKeys::new(&[(255, ONE)]).unwrap();
        let receipt = receipt(255);
        let text = signed(&keys, receipt);
        assert_eq!(text.len(), TEXT_BYTES);
        assert_eq!(text.capacity(), TEXT_BYTES, "one allocation");
        assert_eq!(keys.verify(&text), Ok(receipt));
        let cancelled = Order {
            status: Status::Cancelled,
            ..receipt.order
        };
        assert_eq!(keys.sign(receipt.sale, &cancelled), Ok(Some(text)));
    }

    #[test]
    fn the_form_of_a_receipt_stays_as_it_is() {
        let keys = ReceiptKeys::new(&[(1, ONE)]).unwrap();
        let parts = [
            "v1.1.AAAAAAAAAAAAAAAAAAAAAQAAAAffVYJDmUSokHVndrkAAAAAAAAAAAAAAAAAAAACAAAAAw",
            "AAAAUAAAAAAAAABgAAAAAAAAAHAAAAAAAAAAQAAAAAAAAHz0VVUgAAAZq2l-h4CAgICAgICAgBA",
            "Q.OzKS18PnG7CO1YmKvISlMxAgU09bOeyzvLhw5nTxSdo",
        ];
        assert_eq!(signed(&keys, receipt(1)), parts.concat());
    }

    #[test]
    fn every_field_is_signed() {
        let keys = ReceiptKeys::new(&[(1, ONE)]).unwrap();
        let real = receipt(1);
        let mut others = vec![Receipt {
            sale: SaleId(Uuid::from_u128(9)),
            ..real
        }];
        let change: [fn(&mut Order); 12] = [
            |order| order.id.0 = Uuid::from_u128(9),
            |order| order.buyer.0 = Uuid::from_u128(9),
            |order| order.round.round += 1,
            |order| order.epoch.0 += 1,
            |order| order.seq += 1,
            |order| order.pseq += 1,
            |order| order.quantity += 1,
            |order| order.unit_price.amount += 1,
            |order| order.accepted_at_ms += 1,
            |order| order.fingerprint.0[7] += 1,
            |order| order.durability = Durability::Fast,
            |order| order.accepted_as = Status::Held,
        ];
        others.extend(change.map(|change| {
            let mut other = real;
            change(&mut other.order);
            other
        }));
        let mut texts: Vec<_> = others.iter().map(|other| signed(&keys, *other)).collect();
        texts.push(signed(&keys, real));
        let count = texts.len();
        texts.sort_unstable();
        texts.dedup();
        assert_eq!(texts.len(), count);
    }

    #[test]
    fn the_first_key_signs_and_all_verify() {
        let old = ReceiptKeys::new(&[(1, ONE)]).unwrap();
        let both = ReceiptKeys::new(&[(2, TWO), (1, ONE)]).unwrap();
        let new = ReceiptKeys::new(&[(2, TWO)]).unwrap();
        assert_eq!((old.signing(), both.signing()), (1, 2));
        let text = signed(&old, receipt(1));
        assert_eq!(both.verify(&text), Ok(receipt(1)));
        // Also to sign an old order again.
        assert_eq!(signed(&both, receipt(1)), text);
        assert_eq!(new.verify(&text), Err(Invalid::UnknownKey));
        let Receipt { sale, order } = receipt(1);
        assert_eq!(new.sign(sale, &order), Err(UnknownKey(1)));
        assert_eq!(
            old.verify(&signed(&both, receipt(2))),
            Err(Invalid::UnknownKey)
        );
        // The same number with another secret is not the same key.
        let other = ReceiptKeys::new(&[(1, TWO)]).unwrap();
        assert_eq!(other.verify(&text), Err(Invalid::Forged));
        assert_eq!(old.sign(sale, &receipt(0).order), Ok(None));
    }

    #[test]
    fn weak_and_doubtful_keys_are_refused() {
        let refused = |secrets: &[(u8, &[u8])]| ReceiptKeys::new(secrets).unwrap_err();
        assert_eq!(refused(&[]), KeyError::None);
        assert_eq!(refused(&[(0, ONE)]), KeyError::Zero);
        assert_eq!(refused(&[(3, ONE), (3, TWO)]), KeyError::Twice(3));
        let weak = KeyError::Weak {
            number: 2,
            bytes: 31,
        };
        assert_eq!(refused(&[(1, ONE), (2, &ONE[..31])]), weak);
        let keys = ReceiptKeys::new(&[(1, ONE)]).unwrap();
        assert_eq!(format!("{keys:?}"), "{1}");
        assert_eq!(ReceiptKeys::derive(ONE).len(), SECRET_MIN_BYTES);
        assert_ne!(ReceiptKeys::derive(ONE), ReceiptKeys::derive(TWO));
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_refused() {
        let keys = ReceiptKeys::new(&[(1, ONE), (3, TWO)]).unwrap();
        let text = signed(&keys, receipt(1));
        for at in 0..text.len() {
            for bit in 0..8 {
                let mut bytes = text.clone().into_bytes();
                bytes[at] ^= 1 << bit;
                if let Ok(flipped) = String::from_utf8(bytes) {
                    assert!(keys.verify(&flipped).is_err(), "bit {bit} of byte {at}");
                }
            }
            for other in "A.-_=1 "
                .chars()
                .filter(|other| !text[at..].starts_with(*other))
            {
                let mut changed = text.clone();
                changed.replace_range(at..=at, other.encode_utf8(&mut [0; 4]));
                assert!(keys.verify(&changed).is_err(), "{other:?} at {at}");
            }
            assert!(keys.verify(&text[..at]).is_err());
            assert!(keys.verify(&text[at + 1..]).is_err());
        }
        for changed in [
            format!("{text}="),
            format!(" {text}"),
            format!("{text}.{text}"),
            text.replacen("v1.1.", "v1.01.", 1),
            text.replacen("v1.1.", "v1.+1.", 1),
            text.replacen("v1.", "v2.", 1),
        ] {
            assert!(keys.verify(&changed).is_err(), "{changed}");
        }
        assert_eq!(keys.verify(&text), Ok(receipt(1)));
    }

    proptest! {
        #[test]
        fn whatever_is_read_never_panics(
            text in prop_oneof![
                any::<String>(),
                "v1\\.[0-9]{1,3}\\.[A-Za-z0-9_-]{0,200}\\.[A-Za-z0-9_-]{0,50}",
            ],
            bytes in prop::collection::vec(any::<u8>(), 0..2 * PAYLOAD_BYTES),
            exact in prop::collection::vec(any::<u8>(), PAYLOAD_BYTES),
        ) {
            let keys = ReceiptKeys::new(&[(1, ONE)]).unwrap();
            prop_assert!(keys.verify(&text).is_err());
            // Also behind the signature, should a key ever leak.
            prop_assert!(bytes.len() == PAYLOAD_BYTES || unpack(&bytes, 1).is_none());
            if let Some(Receipt { sale, order }) = unpack(&exact, 1) {
                prop_assert_eq!(pack(sale, &order).to_vec(), exact);
            }
        }
    }
}
