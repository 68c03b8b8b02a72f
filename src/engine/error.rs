//! Why an operation of the engine has no answer.

use crate::faults;

/// An operation that was not decided, or whose decision did not come back.
///
/// Business refusals are not errors: they are answers.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EngineError {
    /// The queue is full. Not applied.
    #[error("{0} purchases are waiting already")]
    Overloaded(usize),
    /// There is no connection, so nothing was sent. Not applied.
    #[error("Redis is not connected")]
    Disconnected,
    /// Redis may have lost something, or is not the server it should be. Not applied.
    #[error("fenced: {0}")]
    Fenced(String),
    /// The keys of one round are missing or not whole. Not applied; other rounds go on.
    #[error("round damaged: {0}")]
    Damaged(String),
    /// Redis refused to run the script (out of memory, read only, loading …). Not applied.
    #[error("Redis refused: {0}")]
    Refused(String),
    /// Redis got to the call after its deadline. Not applied.
    #[error("the call reached Redis after its deadline")]
    Expired,
    /// The call was sent, and may have run or may still run.
    #[error("no answer from Redis: {0}")]
    Unknown(String),
    /// Redis accepted, and fewer replicas than the sale asks for have it. It is there, and may be
    /// lost: only the same call again tells.
    #[error("{acks} of {wanted} replicas have it")]
    Unreplicated {
        /// Replicas that have it.
        acks: u32,
        /// Replicas that must.
        wanted: u32,
    },
    /// Redis answered something that this version does not understand. It may have run.
    #[error("answer of Redis not understood: {0}")]
    Protocol(String),
}

impl EngineError {
    /// Redis does not let this user do what it must, by what Redis says.
    pub(super) fn denied(said: &str) -> Self {
        Self::Refused(format!(
            "{said}: user and password are part of its URL, what the user must be allowed is in \
             deploy/redis-users.conf"
        ))
    }

    /// Whether the operation may have had an effect, or may still have one.
    pub fn may_have_run(&self) -> bool {
        match self {
            Self::Overloaded(_)
            | Self::Disconnected
            | Self::Fenced(_)
            | Self::Damaged(_)
            | Self::Refused(_)
            | Self::Expired => false,
            Self::Unknown(_) | Self::Unreplicated { .. } | Self::Protocol(_) => {
                !faults::bug("unknown_told_as_refused")
            }
        }
    }
}
