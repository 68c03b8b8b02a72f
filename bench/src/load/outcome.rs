//! What an answer means to a buyer: it is final, or the purchase is tried again with the same key.

use std::borrow::Cow;
use std::fmt;
use std::time::Duration;

use bytes::Bytes;
use serde::Deserialize;

/// A purchase call cannot run later than two seconds after it was sent (the server's deadline in
/// every call), so what is refused later than this after a lost answer has certainly no order.
const DOUBT_LASTS: Duration = Duration::from_secs(3);

/// An answer, as far as a buyer reads it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    /// `Idempotency-Replayed: true`.
    pub(crate) replayed: bool,
    /// Seconds.
    pub(crate) retry_after: Option<u64>,
    /// The connection carries nothing more.
    pub(crate) closes: bool,
    pub(crate) body: Bytes,
}

/// How a purchase ended for its buyer.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Outcome {
    /// 201. The body is the order as it was accepted.
    Accepted { replayed: bool, body: Bytes },
    /// Refused for good: there is no order.
    Refused { code: String },
    /// Given up, and certainly without an order.
    Failed { reason: String },
    /// Given up, and there may be an order.
    Unknown { reason: String },
}

/// Why a purchase did not end yet.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Setback {
    /// The server refused for now, with this code.
    Refused(String),
    /// The server failed, or could not be reached.
    Broken(String),
}

impl Setback {
    /// The outcome when patience ends here.
    pub(crate) fn give_up(self, in_doubt: bool) -> Outcome {
        match self {
            Self::Refused(reason) | Self::Broken(reason) if in_doubt => Outcome::Unknown { reason },
            Self::Refused(code) => Outcome::Refused { code },
            Self::Broken(reason) => Outcome::Failed { reason },
        }
    }
}

impl fmt::Display for Setback {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused(reason) | Self::Broken(reason) => f.write_str(reason),
        }
    }
}

/// What to do after an answer.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Next {
    /// The purchase is over.
    Done(Outcome),
    /// Try again with the same key.
    Again {
        setback: Setback,
        /// This request may have bought, or may still buy.
        doubtful: bool,
        /// Not earlier than this from now.
        wait: Duration,
    },
}

#[derive(Deserialize)]
struct Problem<'a> {
    #[serde(borrow)]
    code: Cow<'a, str>,
    #[serde(borrow)]
    outcome: Cow<'a, str>,
    #[serde(borrow)]
    retry: Cow<'a, str>,
    starts_in_ms: Option<u64>,
}

/// Reads an answer. `doubt` says how long ago an answer to this key was last lost.
pub(crate) fn judge(answer: Answer, doubt: Option<Duration>) -> Next {
    let status = answer.status;
    if status == 201 {
        let Answer { replayed, body, .. } = answer;
        return Next::Done(Outcome::Accepted { replayed, body });
    }
    let Ok(problem) = serde_json::from_slice::<Problem>(&answer.body) else {
        // Nothing that the contract knows; believing anything would be guessing.
        return Next::Again {
            setback: Setback::Broken(format!("status {status} without a problem document")),
            doubtful: true,
            wait: Duration::ZERO,
        };
    };
    let asked = answer.retry_after.map(Duration::from_secs);
    let opens = problem.starts_in_ms.map(Duration::from_millis);
    let wait = opens.or(asked).unwrap_or_default();
    let code = problem.code.into_owned();
    if problem.outcome != "not_applied" {
        return Next::Again {
            setback: Setback::Broken(code),
            doubtful: true,
            wait,
        };
    }
    if status >= 500 {
        return Next::Again {
            setback: Setback::Broken(code),
            doubtful: false,
            wait,
        };
    }
    // Only a script looks the key up, and only scripts refuse with these.
    let looked_up = problem.retry == "never" && matches!(status, 409 | 422);
    match (&*problem.retry, doubt) {
        ("after", _) => Next::Again {
            setback: Setback::Refused(code),
            doubtful: false,
            wait,
        },
        // It says nothing about the answer that was lost: that one may still run.
        (_, Some(age)) if !looked_up && age < DOUBT_LASTS => Next::Again {
            setback: Setback::Refused(code),
            doubtful: false,
            wait: wait.max(DOUBT_LASTS.saturating_sub(age)),
        },
        _ => Next::Done(Outcome::Refused { code }),
    }
}

/// Reads an answer of a server that does not speak our API: it was done, or it was not.
pub(crate) fn judge_plainly(answer: Answer, _: Option<Duration>) -> Next {
    Next::Done(match answer.status {
        200..=299 => Outcome::Accepted {
            replayed: answer.replayed,
            body: answer.body,
        },
        status => Outcome::Refused {
            code: format!("status {status}"),
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(status: u16, code: &str, outcome: &str, retry: &str) -> Answer {
        let body = format!(
            r#"{{"type":"/docs/problems/{code}","title":"t","status":{status},"detail":"d","instance":"i","code":"{code}","outcome":"{outcome}","retry":"{retry}"}}"#
        );
        answer(status, body)
    }

    fn answer(status: u16, body: impl Into<Bytes>) -> Answer {
        Answer {
            status,
            body: body.into(),
            ..Answer::default()
        }
    }

    fn refused(code: &str) -> Next {
        Next::Done(Outcome::Refused {
            code: code.to_owned(),
        })
    }

    #[test]
    fn a_201_is_final_and_says_whether_it_is_a_replay() {
        for replayed in [false, true] {
            let body = Bytes::from_static(b"{}");
            let answer = Answer {
                replayed,
                ..answer(201, body.clone())
            };
            let next = judge(answer, None);
            assert_eq!(next, Next::Done(Outcome::Accepted { replayed, body }));
        }
    }

    #[test]
    fn a_refusal_is_final_when_nothing_is_in_doubt() {
        for retry in ["never", "same_key"] {
            let answer = problem(409, "sold_out", "not_applied", retry);
            assert_eq!(judge(answer, None), refused("sold_out"));
        }
        let answer = problem(401, "unauthenticated", "not_applied", "never");
        assert_eq!(judge(answer, None), refused("unauthenticated"));
    }

    #[test]
    fn after_a_lost_answer_only_a_look_up_or_time_makes_a_refusal_final() {
        let young = Some(Duration::from_millis(500));
        let from_memory = problem(409, "sold_out", "not_applied", "same_key");
        assert_eq!(
            judge(from_memory.clone(), young),
            Next::Again {
                setback: Setback::Refused("sold_out".to_owned()),
                doubtful: false,
                wait: Duration::from_millis(2500),
            }
        );
        assert_eq!(judge(from_memory, Some(DOUBT_LASTS)), refused("sold_out"));
        let looked_up = problem(409, "sold_out", "not_applied", "never");
        assert_eq!(judge(looked_up, young), refused("sold_out"));
        let never_reached_a_script = problem(403, "forbidden", "not_applied", "never");
        assert!(matches!(
            judge(never_reached_a_script, young),
            Next::Again { .. }
        ));
    }

    #[test]
    fn an_unknown_outcome_is_tried_again_and_leaves_a_doubt() {
        let mut unknown = problem(503, "unavailable", "unknown", "same_key");
        unknown.retry_after = Some(2);
        assert_eq!(
            judge(unknown, None),
            Next::Again {
                setback: Setback::Broken("unavailable".to_owned()),
                doubtful: true,
                wait: Duration::from_secs(2),
            }
        );
        assert!(matches!(
            judge(answer(502, "<html>"), None),
            Next::Again { doubtful: true, .. }
        ));
    }

    #[test]
    fn what_passes_by_waiting_is_waited_for() {
        let mut limited = problem(429, "rate_limited", "not_applied", "after");
        limited.retry_after = Some(1);
        let Next::Again { wait, doubtful, .. } = judge(limited, None) else {
            panic!("final");
        };
        assert_eq!((wait, doubtful), (Duration::from_secs(1), false));
        let early =
            r#"{"code":"not_open","outcome":"not_applied","retry":"after","starts_in_ms":30}"#;
        let Next::Again { wait, .. } = judge(answer(409, early), None) else {
            panic!("final");
        };
        assert_eq!(wait, Duration::from_millis(30));
        let busy = problem(503, "unavailable", "not_applied", "same_key");
        assert!(matches!(
            judge(busy, None),
            Next::Again {
                doubtful: false,
                ..
            }
        ));
    }

    #[test]
    fn giving_up_tells_failed_from_unknown() {
        let broken = Setback::Broken("unavailable".to_owned());
        let reason = "unavailable".to_owned();
        assert_eq!(
            broken.clone().give_up(true),
            Outcome::Unknown {
                reason: reason.clone()
            }
        );
        assert_eq!(broken.give_up(false), Outcome::Failed { reason });
        let code = "paused".to_owned();
        assert_eq!(
            Setback::Refused(code.clone()).give_up(false),
            Outcome::Refused { code }
        );
    }
}
