//! Why purchases were refused, as reports count it.

use super::order::Refusal;

macro_rules! reasons {
    ($($(#[$doc:meta])* $reason:ident $word:literal)*) => {
        /// Why a purchase was refused: the code of the problem that its client got.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub enum Reason {
            $($(#[$doc])* $reason,)*
        }

        impl Reason {
            /// All of them, in their order.
            pub const ALL: &[Self] = &[$(Self::$reason),*];

            /// The word in the API and in PostgreSQL.
            pub fn as_str(self) -> &'static str {
                match self {
                    $(Self::$reason => $word,)*
                }
            }
        }
    };
}

reasons! {
    /// Before the window.
    NotOpen "not_open"
    /// Stopped by an operator.
    Paused "paused"
    /// After the window, or closed.
    Closed "closed"
    /// More than one order may ask for.
    OrderLimit "order_limit"
    /// More than one buyer may have.
    BuyerLimit "buyer_limit"
    /// Nothing was left.
    SoldOut "sold_out"
    /// Less was left than was asked for.
    Insufficient "insufficient"
    /// The key stood for another request.
    Mismatch "idempotency_key_mismatch"
    /// The stores could not keep what the sale promises.
    NotDurable "not_durable"
    /// Nobody could decide.
    Unavailable "unavailable"
}

impl Reason {
    /// The reason of a refusal; none where it is only a question back.
    pub fn of(refusal: &Refusal) -> Option<Self> {
        Some(match refusal {
            Refusal::Mismatch => Self::Mismatch,
            Refusal::NotOpen { .. } => Self::NotOpen,
            Refusal::Paused => Self::Paused,
            Refusal::Closed => Self::Closed,
            Refusal::OrderLimit { .. } => Self::OrderLimit,
            Refusal::BuyerLimit { .. } => Self::BuyerLimit,
            Refusal::SoldOut => Self::SoldOut,
            Refusal::Insufficient { .. } => Self::Insufficient,
            Refusal::Archived { .. } | Refusal::LeftOut => return None,
        })
    }

    /// Its place in [`Self::ALL`].
    pub fn index(self) -> usize {
        self as usize
    }
}
