//! Names of things: who buys, what is sold, which order, where in the journal.

use std::fmt;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use uuid::{Builder, Uuid};

macro_rules! uuid_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub Uuid);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self.0)
            }
        }

        impl From<Uuid> for $name {
            fn from(id: Uuid) -> Self {
                Self(id)
            }
        }
    };
}

uuid_id!(
    /// A buyer: the subject of an access token, registered here or not.
    BuyerId
);
uuid_id!(
    /// A product.
    ProductId
);
uuid_id!(
    /// A sale, as the API names it.
    SaleId
);
uuid_id!(
    /// An order. Derived, never random: see [`OrderId::derive`].
    OrderId
);
uuid_id!(
    /// An operator's operation that must have one effect only; see [`OperationId::derive`].
    OperationId
);
uuid_id!(
    /// A payment; see [`PaymentId::derive`].
    PaymentId
);

/// The short name of a sale inside Redis and inside order ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SaleNumber(pub u32);

/// One running of a sale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RoundId {
    /// Whose running.
    pub sale: SaleNumber,
    /// Which: 1, 2, 3 ….
    pub round: u32,
}

impl fmt::Display for RoundId {
    /// `17.1`: the first round of sale 17, as it stands in key names.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.sale.0, self.round)
    }
}

/// A Redis hash tag: its rounds, journal and position belong together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Partition(pub u16);

impl fmt::Display for Partition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "p{}", self.0)
    }
}

/// A timeline of a partition; a new one begins whenever Redis may have lost something.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Epoch(pub u32);

/// A place in the journal of a partition. Ordered: a later epoch comes after an earlier one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct JournalId {
    /// The timeline.
    pub epoch: Epoch,
    /// The number of the entry; it goes on across epochs without a gap.
    pub pseq: u64,
}

impl fmt::Display for JournalId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.epoch.0, self.pseq)
    }
}

impl BuyerId {
    /// Eight bytes of the id: enough to tell apart the buyers of one sale almost always.
    pub fn prefix(self) -> u64 {
        self.0.as_u64_pair().1
    }
}

impl OrderId {
    /// The id of the order that this buyer's key makes in this sale, whatever the attempt.
    ///
    /// `UUIDv8`: the sale's number in the first four bytes, so that an id says where its order
    /// lives, then SHA-256 over the length-prefixed parts. Per sale and not per round, so that a
    /// retry across the turn of a round cannot buy twice.
    pub fn derive(sale: SaleNumber, buyer: BuyerId, key: &str) -> Self {
        let number = sale.0.to_be_bytes();
        let mut bytes = digest(&[b"order", &number, buyer.0.as_bytes(), key.as_bytes()]);
        bytes[..4].copy_from_slice(&number);
        Self(Builder::from_custom_bytes(bytes).into_uuid())
    }

    /// The sale that an order with this id belongs to, if there is one.
    pub fn sale(self) -> SaleNumber {
        let [a, b, c, d, ..] = *self.0.as_bytes();
        SaleNumber(u32::from_be_bytes([a, b, c, d]))
    }

    /// Eight bytes of the hash: enough to tell apart the orders of one sale almost always.
    pub fn prefix(self) -> u64 {
        self.0.as_u64_pair().1
    }
}

impl OperationId {
    /// The id of what `actor` asks for with `key`; `operation` names the route and its object.
    pub fn derive(operation: &str, actor: Uuid, key: &str) -> Self {
        let bytes = digest(&[operation.as_bytes(), actor.as_bytes(), key.as_bytes()]);
        Self(Builder::from_custom_bytes(bytes).into_uuid())
    }
}

impl PaymentId {
    /// The id of what `buyer` pays with `key`; `what` names what is paid for.
    pub fn derive(what: &str, buyer: BuyerId, key: &str) -> Self {
        let parts: [&[u8]; 4] = [
            b"payment",
            what.as_bytes(),
            buyer.0.as_bytes(),
            key.as_bytes(),
        ];
        Self(Builder::from_custom_bytes(digest(&parts)).into_uuid())
    }
}

/// What a request asked for, in eight bytes: the same key with another request is a mismatch.
#[derive(Default, Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Fingerprint(pub [u8; 8]);

impl Fingerprint {
    /// The fingerprint of a request's parts, in their order.
    pub fn of(parts: &[&[u8]]) -> Self {
        let [a, b, c, d, e, f, g, h, ..] = digest(parts);
        Self([a, b, c, d, e, f, g, h])
    }

    /// The fingerprint of a request for so many units: `restock`, `reduce`, `cancel` …
    pub fn units(word: &str, units: u64) -> Self {
        Self::of(&[word.as_bytes(), &units.to_be_bytes()])
    }
}

/// The first 16 bytes of SHA-256 over the parts, each behind its length, so that no two lists of
/// parts can run together into the same bytes.
fn digest(parts: &[&[u8]]) -> [u8; 16] {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_be_bytes());
        hash.update(part);
    }
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&hash.finalize()[..16]);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_order_id_says_its_sale_and_depends_on_every_part() {
        let (a, b) = (BuyerId(Uuid::from_u128(1)), BuyerId(Uuid::from_u128(2)));
        let id = OrderId::derive(SaleNumber(7), a, "k");
        assert_eq!(id, OrderId::derive(SaleNumber(7), a, "k"));
        assert_eq!(id.sale(), SaleNumber(7));
        assert_eq!(id.0.get_version_num(), 8);
        for other in [
            OrderId::derive(SaleNumber(8), a, "k"),
            OrderId::derive(SaleNumber(7), b, "k"),
            OrderId::derive(SaleNumber(7), a, "l"),
        ] {
            assert_ne!(id, other);
            assert_ne!(id.prefix(), other.prefix());
        }
    }

    #[test]
    fn parts_do_not_run_together() {
        assert_ne!(
            Fingerprint::of(&[b"ab", b"c"]),
            Fingerprint::of(&[b"a", b"bc"])
        );
    }
}
