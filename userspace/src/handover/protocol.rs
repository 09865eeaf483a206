//! What two daemons of one node say to each other, and in which order. Pure: no socket, no clock.
//!
//! ```text
//! successor    Hello            Take                             Served
//! predecessor         Welcome        Taken(n) Pod … Pod                 Goodbye
//!                   | Refused                                  | Revoked
//! ```
//!
//! `Goodbye` is what makes the successor the owner. Until then the predecessor goes on as if nothing had been if the
//! successor falls silent. Whoever is refused for its version may say `Leave`: then the predecessor lets go of the node, which
//! is taken over as after any end of a daemon. `Hello`, `Refused` and `Leave` are the same in every version. The conversation
//! stays open: a successor that is told to end says `Ending` in it. A predecessor that is still there then comes to its door,
//! and has the node back with the parts exchanged.

use crate::{mesh::WorkloadUid, net::Role};
use serde::{Deserialize, Serialize};
use std::fmt;

/// Of everything but the words that never change.
pub const VERSION: u32 = 1;
/// The most descriptors that come with one message: three roles in two families, or the tenure.
pub(super) const DESCRIPTORS: usize = 8;
/// Bytes of the longest message.
pub(super) const LONGEST: usize = 4096;

/// What must be the same on both sides.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Version {
    /// [`VERSION`].
    pub protocol: u32,
    /// Of the maps in the kernel, which both write.
    pub layout: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "say", rename_all = "kebab-case")]
pub enum FromSuccessor {
    Hello {
        version: Version,
        node: String,
    },
    Take,
    Served,
    Leave,
    /// Who owns the node since `Goodbye` is told to end.
    Ending,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "say", rename_all = "kebab-case")]
pub enum FromPredecessor {
    Welcome,
    Refused {
        why: String,
    },
    /// It comes with the tenure, and so many pods follow.
    Taken {
        pods: u32,
    },
    /// It comes with the sockets.
    Pod(PodSockets),
    Goodbye,
    Revoked {
        why: String,
    },
}

/// The listeners of one pod: which role each of the descriptors beside has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodSockets {
    pub workload: String,
    /// The cookie of its network namespace.
    pub namespace: u64,
    pub roles: Vec<RoleWord>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RoleWord {
    Outbound,
    Plaintext,
    Hbone,
}

impl From<Role> for RoleWord {
    fn from(role: Role) -> Self {
        match role {
            Role::Outbound => Self::Outbound,
            Role::Plaintext => Self::Plaintext,
            Role::Hbone => Self::Hbone,
        }
    }
}

impl From<RoleWord> for Role {
    fn from(word: RoleWord) -> Self {
        match word {
            RoleWord::Outbound => Self::Outbound,
            RoleWord::Plaintext => Self::Plaintext,
            RoleWord::Hbone => Self::Hbone,
        }
    }
}

/// Why a successor cannot be given the node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mismatch {
    Protocol { ours: u32, theirs: u32 },
    Layout { ours: u32, theirs: u32 },
    Node { ours: String, theirs: String },
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Protocol { ours, theirs } => {
                write!(
                    f,
                    "it speaks version {theirs} of the hand-over, this daemon version {ours}"
                )
            }
            Self::Layout { ours, theirs } => {
                write!(f, "its maps have layout {theirs}, those of this daemon layout {ours}")
            }
            Self::Node { ours, theirs } => write!(f, "it is the daemon of node {theirs}, this one of node {ours}"),
        }
    }
}

/// The other side did not keep to the protocol.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Misstep {
    #[error("a message is longer than {LONGEST} bytes")]
    TooLong,
    #[error("a message brings more than {DESCRIPTORS} descriptors")]
    TooManyDescriptors,
    #[error("a message is not understood: {why}")]
    NotUnderstood { why: String },
    #[error("{said:?} out of turn")]
    OutOfTurn { said: &'static str },
    #[error("{said:?} with {came} descriptors instead of {wanted}")]
    Descriptors {
        said: &'static str,
        wanted: usize,
        came: usize,
    },
    #[error("{pods} pods are more than a node has")]
    TooManyPods { pods: u32 },
}

/// More pods than any node runs.
const PODS: u32 = 16_384;

impl FromSuccessor {
    fn name(&self) -> &'static str {
        match self {
            Self::Hello { .. } => "hello",
            Self::Take => "take",
            Self::Served => "served",
            Self::Leave => "leave",
            Self::Ending => "ending",
        }
    }
}

impl FromPredecessor {
    fn name(&self) -> &'static str {
        match self {
            Self::Welcome => "welcome",
            Self::Refused { .. } => "refused",
            Self::Taken { .. } => "taken",
            Self::Pod(_) => "pod",
            Self::Goodbye => "goodbye",
            Self::Revoked { .. } => "revoked",
        }
    }

    /// How many descriptors belong to it.
    fn descriptors(&self) -> usize {
        match self {
            Self::Taken { .. } => 1,
            Self::Pod(pod) => pod.roles.len(),
            Self::Welcome | Self::Refused { .. } | Self::Goodbye | Self::Revoked { .. } => 0,
        }
    }
}

/// The predecessor's side of one conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Giver {
    Greeting,
    Welcomed,
    Refused,
    Giving,
    /// The node is the successor's.
    Given,
    Done,
}

/// What the predecessor does next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reaction {
    Welcome,
    Refuse(Mismatch),
    /// Stop, and give everything away.
    Give,
    /// The successor serves: say goodbye.
    LetGo,
    /// Let go of the node.
    Leave,
    /// Come to the successor's door as it came to ours.
    Return,
}

impl Giver {
    /// What follows from what the successor said.
    ///
    /// # Errors
    /// It was not its turn: the conversation is over.
    pub fn hear(&mut self, said: &FromSuccessor, ours: Version, node: &str) -> Result<Reaction, Misstep> {
        let out_of_turn = Misstep::OutOfTurn { said: said.name() };
        let (next, reaction) = match (&*self, said) {
            (Self::Greeting, FromSuccessor::Hello { version, node: theirs }) => {
                match mismatch(ours, node, *version, theirs) {
                    None => (Self::Welcomed, Reaction::Welcome),
                    // The daemon of another node has nothing to say here.
                    Some(mismatch @ Mismatch::Node { .. }) => (Self::Done, Reaction::Refuse(mismatch)),
                    Some(mismatch) => (Self::Refused, Reaction::Refuse(mismatch)),
                }
            }
            (Self::Welcomed, FromSuccessor::Take) => (Self::Giving, Reaction::Give),
            (Self::Giving, FromSuccessor::Served) => (Self::Given, Reaction::LetGo),
            (Self::Given, FromSuccessor::Ending) => (Self::Done, Reaction::Return),
            (Self::Refused, FromSuccessor::Leave) => (Self::Done, Reaction::Leave),
            (Self::Greeting | Self::Welcomed | Self::Refused | Self::Giving | Self::Given | Self::Done, _) => {
                return Err(out_of_turn);
            }
        };
        *self = next;
        Ok(reaction)
    }
}

fn mismatch(ours: Version, node: &str, theirs: Version, their_node: &str) -> Option<Mismatch> {
    if ours.protocol != theirs.protocol {
        return Some(Mismatch::Protocol {
            ours: ours.protocol,
            theirs: theirs.protocol,
        });
    }
    if ours.layout != theirs.layout {
        return Some(Mismatch::Layout {
            ours: ours.layout,
            theirs: theirs.layout,
        });
    }
    (node != their_node).then(|| Mismatch::Node {
        ours: node.to_owned(),
        theirs: their_node.to_owned(),
    })
}

/// The successor's side of one conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Taker {
    Greeted,
    /// It may prepare itself, and take when it is ready.
    Welcomed,
    Asked,
    /// So many pods are still to come.
    Receiving(u32),
    /// It has everything, and is the owner once it serves and the predecessor has said goodbye.
    Holding,
    Done,
}

/// One pod that was given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Given {
    pub workload: WorkloadUid,
    pub namespace: u64,
    /// In the order of the descriptors.
    pub roles: Vec<Role>,
}

/// What the successor has heard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Heard {
    Welcome,
    Refused(String),
    /// Beside it is the tenure.
    Taken,
    Pod(Given),
    Goodbye,
    /// The predecessor goes on.
    Revoked(String),
}

impl Taker {
    /// What follows from what the predecessor said; `descriptors` came with it.
    ///
    /// # Errors
    /// It was not its turn, or what should have come with it did not: the conversation is over.
    pub fn hear(&mut self, said: FromPredecessor, descriptors: usize) -> Result<Heard, Misstep> {
        let (name, wanted) = (said.name(), said.descriptors());
        if wanted != descriptors {
            return Err(Misstep::Descriptors {
                said: name,
                wanted,
                came: descriptors,
            });
        }
        let (next, heard) = match (&*self, said) {
            (Self::Greeted, FromPredecessor::Welcome) => (Self::Welcomed, Heard::Welcome),
            (Self::Greeted, FromPredecessor::Refused { why }) => (Self::Done, Heard::Refused(why)),
            (Self::Asked, FromPredecessor::Taken { pods }) if pods > PODS => return Err(Misstep::TooManyPods { pods }),
            (Self::Asked, FromPredecessor::Taken { pods }) => (Self::receiving(pods), Heard::Taken),
            (Self::Receiving(left), FromPredecessor::Pod(pod)) => {
                let given = Given {
                    workload: WorkloadUid(pod.workload.into()),
                    namespace: pod.namespace,
                    roles: pod.roles.into_iter().map(Role::from).collect(),
                };
                (Self::receiving(left - 1), Heard::Pod(given))
            }
            (Self::Holding, FromPredecessor::Goodbye) => (Self::Done, Heard::Goodbye),
            (Self::Asked | Self::Receiving(_) | Self::Holding, FromPredecessor::Revoked { why }) => {
                (Self::Done, Heard::Revoked(why))
            }
            (Self::Greeted | Self::Welcomed | Self::Asked | Self::Receiving(_) | Self::Holding | Self::Done, _) => {
                return Err(Misstep::OutOfTurn { said: name });
            }
        };
        *self = next;
        Ok(heard)
    }

    fn receiving(left: u32) -> Self {
        match left {
            0 => Self::Holding,
            left => Self::Receiving(left),
        }
    }

    /// `Take` has been said.
    pub fn asked(&mut self) {
        *self = Self::Asked;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OURS: Version = Version {
        protocol: VERSION,
        layout: 7,
    };

    fn hello(protocol: u32, layout: u32, node: &str) -> FromSuccessor {
        FromSuccessor::Hello {
            version: Version { protocol, layout },
            node: node.to_owned(),
        }
    }

    fn pod(namespace: u64) -> FromPredecessor {
        FromPredecessor::Pod(PodSockets {
            workload: "u".to_owned(),
            namespace,
            roles: vec![RoleWord::Outbound, RoleWord::Hbone],
        })
    }

    #[test]
    fn the_node_is_given_once_and_in_turn() {
        let mut giver = Giver::Greeting;
        let mut hear = |said| giver.hear(&said, OURS, "n1");
        assert_eq!(hear(hello(VERSION, 7, "n1")), Ok(Reaction::Welcome));
        assert_eq!(hear(FromSuccessor::Served), Err(Misstep::OutOfTurn { said: "served" }));
        assert_eq!(hear(FromSuccessor::Take), Ok(Reaction::Give));
        assert_eq!(hear(FromSuccessor::Take), Err(Misstep::OutOfTurn { said: "take" }));
        assert_eq!(hear(FromSuccessor::Leave), Err(Misstep::OutOfTurn { said: "leave" }));
        assert_eq!(hear(FromSuccessor::Ending), Err(Misstep::OutOfTurn { said: "ending" }));
        assert_eq!(hear(FromSuccessor::Served), Ok(Reaction::LetGo));
        assert_eq!(hear(FromSuccessor::Served), Err(Misstep::OutOfTurn { said: "served" }));
        assert_eq!(hear(FromSuccessor::Ending), Ok(Reaction::Return));
        assert_eq!(hear(FromSuccessor::Ending), Err(Misstep::OutOfTurn { said: "ending" }));
    }

    #[test]
    fn a_successor_that_does_not_fit_is_refused_by_name_and_may_only_ask_us_to_leave_its_own_node() {
        for (said, why, may_leave) in [
            (
                hello(VERSION + 1, 7, "n1"),
                "it speaks version 2 of the hand-over, this daemon version 1",
                true,
            ),
            (
                hello(VERSION, 8, "n1"),
                "its maps have layout 8, those of this daemon layout 7",
                true,
            ),
            (
                hello(VERSION, 7, "n2"),
                "it is the daemon of node n2, this one of node n1",
                false,
            ),
        ] {
            let mut giver = Giver::Greeting;
            let Ok(Reaction::Refuse(mismatch)) = giver.hear(&said, OURS, "n1") else {
                panic!("{said:?} was not refused")
            };
            assert_eq!(mismatch.to_string(), why);
            assert!(giver.hear(&FromSuccessor::Take, OURS, "n1").is_err());
            assert_eq!(giver.hear(&FromSuccessor::Leave, OURS, "n1").is_ok(), may_leave);
        }
    }

    #[test]
    fn nothing_is_taken_before_it_was_asked_for_and_no_more_than_was_announced() {
        let mut taker = Taker::Greeted;
        assert_eq!(taker.hear(FromPredecessor::Welcome, 0), Ok(Heard::Welcome));
        assert!(taker.hear(FromPredecessor::Taken { pods: 2 }, 1).is_err());
        taker.asked();
        assert_eq!(taker.hear(FromPredecessor::Taken { pods: 2 }, 1), Ok(Heard::Taken));
        assert!(
            taker.hear(FromPredecessor::Goodbye, 0).is_err(),
            "not everything is there"
        );
        for namespace in [5, 6] {
            let given = Given {
                workload: WorkloadUid("u".into()),
                namespace,
                roles: vec![Role::Outbound, Role::Hbone],
            };
            assert_eq!(taker.hear(pod(namespace), 2), Ok(Heard::Pod(given)));
        }
        assert_eq!(taker, Taker::Holding);
        assert!(taker.hear(pod(7), 2).is_err());
        assert_eq!(taker.hear(FromPredecessor::Goodbye, 0), Ok(Heard::Goodbye));
    }

    #[test]
    fn a_predecessor_may_change_its_mind_until_it_has_said_goodbye() {
        let revoked = || FromPredecessor::Revoked { why: "late".to_owned() };
        for state in [Taker::Asked, Taker::Receiving(1), Taker::Holding] {
            let mut taker = state.clone();
            assert_eq!(
                taker.hear(revoked(), 0),
                Ok(Heard::Revoked("late".to_owned())),
                "{state:?}"
            );
        }
        assert!(Taker::Done.hear(revoked(), 0).is_err());
    }

    #[test]
    fn what_comes_without_its_descriptors_or_with_others_is_no_message() {
        let error = |said, descriptors| Taker::Asked.hear(said, descriptors).unwrap_err();
        assert_eq!(
            error(FromPredecessor::Taken { pods: 0 }, 0),
            Misstep::Descriptors {
                said: "taken",
                wanted: 1,
                came: 0
            }
        );
        let mut taker = Taker::Receiving(1);
        assert!(matches!(
            taker.hear(pod(1), 3),
            Err(Misstep::Descriptors { came: 3, .. })
        ));
        assert_eq!(
            error(FromPredecessor::Taken { pods: u32::MAX }, 1),
            Misstep::TooManyPods { pods: u32::MAX }
        );
    }

    #[test]
    fn the_words_that_every_version_must_understand_are_these() {
        let json = |word: &FromSuccessor| serde_json::to_string(word).unwrap();
        assert_eq!(
            json(&hello(1, 7, "n1")),
            r#"{"say":"hello","version":{"protocol":1,"layout":7},"node":"n1"}"#
        );
        assert_eq!(json(&FromSuccessor::Leave), r#"{"say":"leave"}"#);
        let refused = FromPredecessor::Refused { why: "so".to_owned() };
        assert_eq!(
            serde_json::to_string(&refused).unwrap(),
            r#"{"say":"refused","why":"so"}"#
        );
        // A later version may say more.
        let more = r#"{"say":"hello","version":{"protocol":9,"layout":7,"new":1},"node":"n1","more":[]}"#;
        assert_eq!(serde_json::from_str::<FromSuccessor>(more).unwrap(), hello(9, 7, "n1"));
    }
}
