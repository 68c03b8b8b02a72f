//! Who somebody is and what they may do: tokens, passwords, sessions.

pub mod accounts;
pub mod api_key;
pub mod barred;
pub mod bearer;
pub mod email;
pub mod outside;
pub mod password;
pub mod session;
pub mod ticket;
pub mod token;

use serde::{Deserialize, Serialize};

/// What somebody may do; each role may do what the ones before it may.
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Serialize,
    Deserialize,
    utoipa::ToSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Buys for itself.
    Buyer,
    /// Runs sales.
    Operator,
    /// Does everything.
    Admin,
}

impl Role {
    /// The word in tokens, in PostgreSQL and in the API.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Buyer => "buyer",
            Self::Operator => "operator",
            Self::Admin => "admin",
        }
    }

    /// Reads the word.
    pub fn parse(word: &str) -> Option<Self> {
        [Self::Buyer, Self::Operator, Self::Admin]
            .into_iter()
            .find(|role| role.as_str() == word)
    }

    /// Whether this role runs sales.
    pub fn operates(self) -> bool {
        self >= Self::Operator
    }
}
