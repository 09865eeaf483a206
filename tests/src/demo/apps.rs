//! The applications in the demo's pods: real nginx, real MariaDB or OpenSSH, a TCP echo; and curl as a client. None of
//! them knows of the mesh.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::mesh::binary;
use crate::process::Process;
use crate::topology::{Place, Pod, World};
use crate::wait::{DEADLINE, wait_until};

/// The port of the server that speaks first.
pub const DATABASE_PORT: u16 = 3306;
pub const ECHO_PORT: u16 = 7;
pub const HTTP_PORT: u16 = 80;

/// How long a client may take for one request that should be served or refused at once.
const CLIENT_DEADLINE: Duration = Duration::from_secs(10);

/// An nginx that says who it is and whom it sees.
pub fn start_nginx(world: &World, pod: &Pod) -> Result<Process> {
    let directory = home(world, pod, "nginx")?;
    let path = |name: &str| directory.join(name).display().to_string();
    let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .map(|kind| format!("  {kind}_temp_path {};\n", path(kind)))
        .concat();
    let configuration = format!(
        "daemon off;\nuser root;\nworker_processes 1;\npid {pid};\nerror_log stderr;\nevents {{}}\nhttp {{\n{temporary}  \
         access_log {log};\n  default_type text/plain;\n  server {{\n    listen {HTTP_PORT};\n    listen [::]:{HTTP_PORT};\n    \
         location / {{ return 200 \"{name} sees $remote_addr ask for $request_uri\\n\"; }}\n  }}\n}}\n",
        pid = path("nginx.pid"),
        log = path("access.log"),
        name = pod.spec.name,
    );
    fs::write(directory.join("nginx.conf"), configuration).context("write nginx.conf")?;
    let mut process = pod
        .command(program("nginx")?)
        .arg("-c")
        .arg(directory.join("nginx.conf"))
        .spawn()?;
    wait_for_listener(pod, &mut process, HTTP_PORT)?;
    Ok(process)
}

/// A server that speaks before its client does.
#[derive(Debug)]
pub enum Database {
    MariaDb(Process),
    OpenSsh(Process),
}

impl Database {
    /// MariaDB if it is installed and starts, else OpenSSH; `remark` is told what did not start.
    pub fn start(world: &World, pod: &Pod, remark: impl FnOnce(&str)) -> Result<Self> {
        let failure = match program("mariadbd").or_else(|_| program("mysqld")) {
            Ok(mariadbd) => match start_mariadb(world, pod, &mariadbd) {
                Ok(process) => return Ok(Self::MariaDb(process)),
                Err(error) => error,
            },
            Err(error) => error,
        };
        let Ok(sshd) = program("sshd") else {
            return Err(failure.context("MariaDB does not start, and there is no sshd to take its place"));
        };
        remark(&format!("OpenSSH takes the place of MariaDB: {failure:#}"));
        start_openssh(world, pod, &sshd).map(Self::OpenSsh)
    }

    pub fn name(&self) -> &'static str {
        match self {
            Self::MariaDb(_) => "MariaDB",
            Self::OpenSsh(_) => "OpenSSH",
        }
    }

    pub fn process(&mut self) -> &mut Process {
        match self {
            Self::MariaDb(process) | Self::OpenSsh(process) => process,
        }
    }
}

fn start_mariadb(world: &World, pod: &Pod, mariadbd: &Path) -> Result<Process> {
    let home = home(world, pod, "mariadb")?;
    let data = home.join("data");
    // Small and careless of a power cut: it lives for a minute.
    let small = [
        "--innodb-log-file-size=8M",
        "--innodb-buffer-pool-size=16M",
        "--innodb-flush-log-at-trx-commit=0",
    ];
    let install = program("mariadb-install-db").or_else(|_| program("mysql_install_db"))?;
    pod.command(install)
        .args([
            "--no-defaults",
            "--user=root",
            "--auth-root-authentication-method=normal",
            "--skip-test-db",
        ])
        .arg(format!("--datadir={}", data.display()))
        .args(small)
        .output(Duration::from_secs(120))
        .context("prepare MariaDB's data directory")?;
    let init = home.join("init.sql");
    fs::write(&init, "CREATE USER demo@'%';\n").context("write init.sql")?;
    let mut process = pod
        .command(mariadbd)
        .args(["--no-defaults", "--user=root", "--skip-name-resolve", "--skip-log-bin"])
        .arg(format!("--port={DATABASE_PORT}"))
        .arg(format!("--datadir={}", data.display()))
        .arg(format!("--socket={}", home.join("socket").display()))
        .arg(format!("--pid-file={}", home.join("pid").display()))
        .arg(format!("--init-file={}", init.display()))
        .args(small)
        .spawn()?;
    wait_for_listener(pod, &mut process, DATABASE_PORT)?;
    Ok(process)
}

fn start_openssh(world: &World, pod: &Pod, sshd: &Path) -> Result<Process> {
    let home = home(world, pod, "openssh")?;
    let key = home.join("host_key");
    pod.command(program("ssh-keygen")?)
        .args(["-q", "-t", "ed25519", "-N", "", "-f"])
        .arg(&key)
        .output(CLIENT_DEADLINE)
        .context("make a host key for OpenSSH")?;
    // Debian's build refuses to start without its directory for privilege separation.
    fs::create_dir_all("/run/sshd").context("create /run/sshd")?;
    let mut process = pod
        .command(sshd)
        .args([
            "-D",
            "-e",
            "-f",
            "/dev/null",
            "-o",
            "UsePAM=no",
            "-o",
            "PidFile=none",
            "-o",
        ])
        .arg(format!("Port={DATABASE_PORT}"))
        .arg("-h")
        .arg(&key)
        .spawn()?;
    wait_for_listener(pod, &mut process, DATABASE_PORT)?;
    Ok(process)
}

/// Asks MariaDB who it thinks is calling, as a client in `pod`.
pub fn query_database(pod: &Place, server: SocketAddr) -> Result<String> {
    let client = program("mariadb").or_else(|_| program("mysql"))?;
    let answer = pod
        .command(client)
        .args([
            "--no-defaults",
            "--skip-ssl",
            "--batch",
            "--skip-column-names",
            "--connect-timeout=5",
            "--user=demo",
        ])
        .arg(format!("--host={}", server.ip()))
        .arg(format!("--port={}", server.port()))
        .arg("--execute=SELECT USER()")
        .output(CLIENT_DEADLINE)?;
    Ok(answer.trim().to_owned())
}

/// What the server at `address` says first, to a client in `pod`.
pub fn greeting(pod: &Place, address: SocketAddr) -> Result<String> {
    let said = pod
        .command(binary("demo")?)
        .named(format!("{}-greeting", pod.name))
        .args(["greeting", &address.to_string()])
        .output(CLIENT_DEADLINE)?;
    Ok(said.trim().to_owned())
}

/// This program's own echo server.
pub fn start_echo(pod: &Pod) -> Result<Process> {
    let mut process = pod
        .command(binary("demo")?)
        .named(format!("{}-echo", pod.name))
        .args(["echo", &ECHO_PORT.to_string()])
        .spawn()?;
    wait_for_listener(pod, &mut process, ECHO_PORT)?;
    Ok(process)
}

/// What an HTTP server answered.
#[derive(Debug, PartialEq, Eq)]
pub struct Answer {
    /// The pod that answered.
    pub server: String,
    /// The client's address as the server saw it.
    pub client: IpAddr,
}

/// `GET http://ADDRESS/MARKER` by curl in `pod`.
pub fn get(pod: &Place, address: SocketAddr, marker: &str) -> Result<Answer> {
    let text = pod
        .command(program("curl")?)
        .args([
            // Whatever the person's own configuration of curl says does not count here.
            "--disable",
            "--silent",
            "--show-error",
            "--fail",
            "--noproxy",
            "*",
            "--max-time",
            "6",
            "--globoff",
        ])
        .arg(format!("http://{address}/{marker}"))
        .output(CLIENT_DEADLINE)?;
    parse_answer(&text, marker).with_context(|| format!("the answer is {text:?}"))
}

fn parse_answer(text: &str, marker: &str) -> Result<Answer> {
    let (server, rest) = text
        .trim_end()
        .split_once(" sees ")
        .context("not from one of the demo's servers")?;
    let (client, asked) = rest
        .split_once(" ask for /")
        .context("not from one of the demo's servers")?;
    ensure!(asked == marker, "this answers another question: {asked:?}");
    Ok(Answer {
        server: server.to_owned(),
        client: client.parse().context("the client's address")?,
    })
}

/// Where a program is: an ordinary user's PATH, which sudo may keep, lacks the folders of the servers.
pub fn program(name: &str) -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain(["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from));
    folders
        .map(|folder| folder.join(name))
        .find(|path| path.is_file())
        .with_context(|| format!("{name} is not installed (`cargo xtask setup` installs it)"))
}

fn home(world: &World, pod: &Pod, application: &str) -> Result<PathBuf> {
    let directory = world.directory().join(format!("{}-{application}", pod.spec.name));
    fs::create_dir_all(&directory).with_context(|| format!("create {}", directory.display()))?;
    Ok(directory)
}

/// Looks at the pod's sockets instead of dialling: a probe would be a connection of its own in logs and captures.
fn wait_for_listener(pod: &Pod, process: &mut Process, port: u16) -> Result<()> {
    let what = format!("{} listens on port {port}", process.name());
    let listening = wait_until(&what, DEADLINE, || {
        let tables = pod.namespace.run(|| {
            let read = |name| fs::read_to_string(format!("/proc/thread-self/net/{name}")).unwrap_or_default();
            Ok(read("tcp") + &read("tcp6"))
        });
        let is_there = tables.is_ok_and(|tables| tables.lines().any(|line| is_listener(line, port)));
        (is_there || !process.is_running()).then_some(is_there)
    });
    match listening {
        Ok(true) => Ok(()),
        Ok(false) => bail!("{} ended: {}", process.name(), process.log()),
        Err(error) => Err(error.context(process.log())),
    }
}

/// Reads a line of /proc/net/tcp: number, local address, remote address, state, where 0A is LISTEN.
fn is_listener(line: &str, port: u16) -> bool {
    let mut fields = line.split_whitespace().skip(1);
    let (Some(local), Some(_), Some(state)) = (fields.next(), fields.next(), fields.next()) else {
        return false;
    };
    state == "0A" && local.ends_with(&format!(":{port:04X}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_names_its_server_and_the_client_it_saw() -> Result<()> {
        let expected = Answer {
            server: "web-1".to_owned(),
            client: "fd77::1:10".parse()?,
        };
        assert_eq!(parse_answer("web-1 sees fd77::1:10 ask for /abc\n", "abc")?, expected);
        assert!(parse_answer("web-1 sees fd77::1:10 ask for /other\n", "abc").is_err());
        assert!(parse_answer("<html>", "abc").is_err());
        Ok(())
    }

    #[test]
    fn a_listener_is_told_from_a_connection_in_the_table_of_sockets() {
        let line = "   0: 00000000:0050 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1";
        assert!(is_listener(line, 80));
        assert!(!is_listener(line, 8080));
        assert!(!is_listener(&line.replace(" 0A ", " 01 "), 80));
    }
}
