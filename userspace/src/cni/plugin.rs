//! What the plugin does when the container runtime calls it. Everything it needs of the world is a trait, time too.

use super::{
    spec::{self, CniError, Command, Config, Invocation},
    standing::Standing,
    wire::{Ask, PodName, Reply, Request, VERSION, Verdict},
};
use serde_json::Value;
use std::time::Duration;

/// How long a pod that should be captured waits here before the runtime is told to try again.
const PATIENCE: Duration = Duration::from_secs(45);
/// How often a daemon that is not there is looked for.
const POLL: Duration = Duration::from_millis(100);
/// How often it is asked anew, without a daemon, whether the pod has to wait at all.
const ASK_AGAIN: Duration = Duration::from_secs(5);

/// What is outside of the plugin.
pub trait World {
    /// Asks the daemon; `None` if none answers.
    fn daemon(&mut self, request: &Request) -> Option<Reply>;
    /// Whether the pod should be in the mesh, as far as can be known without the daemon.
    fn standing(&mut self, pod: &PodName) -> Standing;
    /// Time since the plugin began.
    fn elapsed(&self) -> Duration;
    fn sleep(&mut self, time: Duration);
}

/// Carries out one call; what it returns is for standard output.
///
/// # Errors
/// The pod may not start, or the call makes no sense.
pub fn run(invocation: &Invocation, config: &Config, world: &mut impl World) -> Result<Option<Value>, CniError> {
    match invocation.command {
        Command::Version => Ok(Some(spec::versions())),
        // The programs and rules go with the namespace; the daemon sees its end.
        Command::Del | Command::Gc => Ok(None),
        // A dead daemon must not make the whole node unready: pods outside the mesh start without it.
        Command::Status => Ok(None),
        Command::Add => {
            let previous = config.previous()?;
            if let Some(request) = request(Ask::Add, invocation, config) {
                admit(&request, world)?;
            }
            Ok(Some(previous.clone()))
        }
        Command::Check => {
            config.previous()?;
            if let Some(request) = request(Ask::Check, invocation, config) {
                check(&request, world)?;
            }
            Ok(None)
        }
    }
}

/// What the daemon is asked; `None` for a pod that is none of its business.
fn request(ask: Ask, invocation: &Invocation, config: &Config) -> Option<Request> {
    let pod = invocation.pod.clone()?;
    if config.exempt.contains(&pod.namespace) {
        return None;
    }
    Some(Request {
        version: VERSION,
        ask,
        pod,
        container: invocation.container.clone(),
        netns: invocation.netns.clone().unwrap_or_default(),
        addresses: config.addresses(),
    })
}

/// Returns once the pod may start.
fn admit(request: &Request, world: &mut impl World) -> Result<(), CniError> {
    let pod = format!("{}/{}", request.pod.namespace, request.pod.name);
    let mut asked: Option<Duration> = None;
    loop {
        let why = match world.daemon(request) {
            Some(reply) => match reply.verdict {
                Verdict::Captured | Verdict::Outside => return Ok(()),
                Verdict::Failed => {
                    return Err(CniError::NotCaptured {
                        pod,
                        why: reply.message,
                    });
                }
                Verdict::Later => reply.message,
            },
            None if asked.is_none_or(|asked| asked + ASK_AGAIN <= world.elapsed()) => {
                let standing = world.standing(&request.pod);
                asked = Some(world.elapsed());
                match standing {
                    Standing::Outside => return Ok(()),
                    Standing::Mesh => NO_DAEMON.to_owned(),
                    Standing::Unknown(why) => format!("{NO_DAEMON}, and {why}"),
                }
            }
            None => NO_DAEMON.to_owned(),
        };
        if world.elapsed() + POLL > PATIENCE {
            return Err(CniError::Later { pod, why });
        }
        world.sleep(POLL);
    }
}

const NO_DAEMON: &str = "the node's warren daemon does not answer";

fn check(request: &Request, world: &mut impl World) -> Result<(), CniError> {
    let pod = format!("{}/{}", request.pod.namespace, request.pod.name);
    match world.daemon(request) {
        None => Err(CniError::Later {
            pod,
            why: NO_DAEMON.to_owned(),
        }),
        Some(reply) => match reply.verdict {
            Verdict::Captured | Verdict::Outside => Ok(()),
            Verdict::Failed => Err(CniError::NotCaptured {
                pod,
                why: reply.message,
            }),
            Verdict::Later => Err(CniError::Later {
                pod,
                why: reply.message,
            }),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// A daemon that answers from a moment on, and a cluster that is or is not to be asked.
    struct Fake {
        now: Duration,
        answers_from: Duration,
        verdict: Verdict,
        standing: Standing,
        asked: usize,
    }

    impl Fake {
        fn new(answers_from: u64, verdict: Verdict, standing: Standing) -> Self {
            Self {
                now: Duration::ZERO,
                answers_from: Duration::from_secs(answers_from),
                verdict,
                standing,
                asked: 0,
            }
        }
    }

    const NEVER: u64 = 1_000_000;

    impl World for Fake {
        fn daemon(&mut self, request: &Request) -> Option<Reply> {
            assert_eq!(request.addresses.len(), 1);
            (self.now >= self.answers_from).then(|| Reply::new(self.verdict.clone(), "as the daemon says"))
        }
        fn standing(&mut self, _pod: &PodName) -> Standing {
            self.asked += 1;
            self.standing.clone()
        }
        fn elapsed(&self) -> Duration {
            self.now
        }
        fn sleep(&mut self, time: Duration) {
            self.now += time;
        }
    }

    fn add(namespace: &str, world: &mut Fake) -> Result<Option<Value>, CniError> {
        call(Command::Add, namespace, world)
    }

    fn call(command: Command, namespace: &str, world: &mut Fake) -> Result<Option<Value>, CniError> {
        let invocation = Invocation {
            command,
            container: "ab".into(),
            netns: Some("/run/netns/cni-1".into()),
            pod: Some(PodName {
                namespace: namespace.into(),
                name: "web-0".into(),
                uid: "u-1".into(),
            }),
        };
        let text = json!({
            "cniVersion": "1.0.0", "exempt": ["kube-system", "warren-system"],
            "prevResult": {"ips": [{"address": "10.244.1.7/24"}]}
        });
        run(&invocation, &Config::read(&text.to_string()).unwrap(), world)
    }

    #[test]
    fn what_the_daemon_decides_holds_and_the_result_before_is_passed_on() {
        for verdict in [Verdict::Captured, Verdict::Outside] {
            let mut world = Fake::new(0, verdict, Standing::Mesh);
            let result = add("shop", &mut world).unwrap().unwrap();
            assert_eq!(result, json!({"ips": [{"address": "10.244.1.7/24"}]}));
            assert_eq!((world.now, world.asked), (Duration::ZERO, 0));
        }
        let mut world = Fake::new(0, Verdict::Failed, Standing::Outside);
        assert!(matches!(add("shop", &mut world), Err(CniError::NotCaptured { .. })));
    }

    #[test]
    fn with_the_daemon_dead_a_pod_outside_the_mesh_starts_at_once_and_one_of_the_mesh_does_not_start() {
        let mut world = Fake::new(NEVER, Verdict::Captured, Standing::Outside);
        assert!(add("default", &mut world).is_ok());
        assert_eq!(world.now, Duration::ZERO);
        for standing in [Standing::Mesh, Standing::Unknown("nobody can say".into())] {
            let mut world = Fake::new(NEVER, Verdict::Captured, standing);
            let error = add("shop", &mut world).unwrap_err();
            assert!(matches!(error, CniError::Later { .. }), "{error}");
            assert!(world.now > Duration::from_secs(44) && world.now <= PATIENCE);
            assert!((9..=10).contains(&world.asked), "{}", world.asked);
        }
    }

    #[test]
    fn a_pod_of_the_mesh_starts_when_the_daemon_is_back() {
        let mut world = Fake::new(7, Verdict::Captured, Standing::Mesh);
        assert!(add("shop", &mut world).is_ok());
        assert_eq!(world.now, Duration::from_secs(7));
    }

    #[test]
    fn pods_of_the_system_and_of_the_mesh_itself_never_wait() {
        for namespace in ["kube-system", "warren-system"] {
            let mut world = Fake::new(NEVER, Verdict::Failed, Standing::Mesh);
            assert!(add(namespace, &mut world).is_ok());
            assert_eq!((world.now, world.asked), (Duration::ZERO, 0));
        }
    }

    #[test]
    fn deletion_and_status_do_not_need_the_daemon() {
        for command in [Command::Del, Command::Gc, Command::Status] {
            let mut world = Fake::new(NEVER, Verdict::Failed, Standing::Mesh);
            assert_eq!(call(command, "shop", &mut world), Ok(None));
        }
        let mut world = Fake::new(NEVER, Verdict::Failed, Standing::Mesh);
        let versions = call(Command::Version, "shop", &mut world).unwrap().unwrap();
        assert!(
            versions["supportedVersions"]
                .as_array()
                .unwrap()
                .contains(&json!("1.0.0"))
        );
    }

    #[test]
    fn a_check_tells_whether_the_pod_is_still_captured() {
        for (verdict, is_well) in [
            (Verdict::Captured, true),
            (Verdict::Outside, true),
            (Verdict::Failed, false),
        ] {
            let mut world = Fake::new(0, verdict, Standing::Mesh);
            assert_eq!(call(Command::Check, "shop", &mut world).is_ok(), is_well);
        }
        let mut world = Fake::new(NEVER, Verdict::Captured, Standing::Mesh);
        assert!(matches!(
            call(Command::Check, "shop", &mut world),
            Err(CniError::Later { .. })
        ));
    }
}
